"""Metrics over steps, read from a log of any length in bounded memory.

Curves are downsampled to min/mean/max buckets of steps, whose width doubles when there are too many. So a spike of one
step in 200,000 is drawn as high as it was. Up to `2 * BUCKETS` steps each step has its own bucket.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUCKETS = 240
LAST_STEP = 10**15
LARGEST = 1e300  # values beyond this are not drawn


@dataclass
class Curve:
    """One metric: finite values in buckets of `width` steps, and first, last, lowest and highest value."""

    width: int = 1
    buckets: dict[int, list[float]] = field(default_factory=dict)  # number -> [low, high, total, count]
    count: int = 0
    not_finite: int = 0
    first: float = math.nan
    last: float = math.nan
    low: float = math.inf
    high: float = -math.inf

    def add(self, step: int, value: float) -> None:
        """Add one value; steps may come in any order."""
        if not -LARGEST < value < LARGEST:  # also False for NaN; an integer may be larger than any float
            self.not_finite += 1
            return
        if not self.count:
            self.first = value
        self.count += 1
        self.last = value
        number = step // self.width
        bucket = self.buckets.get(number)
        if bucket is not None:
            if value < bucket[0]:
                bucket[0] = value
            if value > bucket[1]:
                bucket[1] = value
            bucket[2] += value
            bucket[3] += 1
        else:
            self.buckets[number] = [value, value, value, 1]
            while len(self.buckets) > 2 * BUCKETS:
                self._widen()
        if value < self.low:
            self.low = value
        if value > self.high:
            self.high = value

    def _widen(self) -> None:
        """Double the number of steps per bucket."""
        self.width *= 2
        wider: dict[int, list[float]] = {}
        for number, (low, high, total, count) in self.buckets.items():
            bucket = wider.setdefault(number // 2, [low, high, 0.0, 0])
            bucket[0], bucket[1] = min(bucket[0], low), max(bucket[1], high)
            bucket[2] += total
            bucket[3] += count
        self.buckets = wider

    @property
    def points(self) -> list[tuple[float, float, float, float]]:
        """(step, low, mean, high) of each bucket, in order; the step is the middle of the bucket."""
        middle = (self.width - 1) / 2
        return [
            (number * self.width + middle, low, total / count, high)
            for number, (low, high, total, count) in sorted(self.buckets.items())
        ]

    def mean_of(self, number: int) -> float:
        """Mean of one bucket."""
        return self.buckets[number][2] / self.buckets[number][3]


def trainer_name(metric: str) -> str:
    """The trainer's name of a metric, from a dashboard's name such as `train/loss` or `eval/loss`."""
    if metric.startswith("eval/"):
        return f"eval_{metric.removeprefix('eval/')}"
    return metric.removeprefix("train/")


@dataclass
class Log:
    """The content of `metrics.jsonl`: the wanted curves, the last value of every number, the last step."""

    curves: dict[str, Curve] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    records: int = 0
    broken: int = 0  # lines that are not a JSON object, such as a half line after a kill
    step: int = 0
    max_steps: int | None = None


def read_log(path: Path, wanted: Callable[[str], bool]) -> Log:
    """Read a log line by line; curves are kept for metrics whose name (`trainer_name`) is `wanted`."""
    log = Log()
    if not path.is_file():
        return log
    curves: dict[str, Curve | None] = {}  # by the name in the file
    names: dict[str, str] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            record = parse(line)
            step = record.get("step") if record else None
            if record is None or not isinstance(step, int) or not 0 <= step < LAST_STEP:
                log.broken += bool(line.strip())
                continue
            log.records += 1
            log.step = max(log.step, step)
            for key, value in record.items():
                if value.__class__ is not float and value.__class__ is not int:  # a bool is not a number here
                    continue
                if key not in curves:
                    names[key] = trainer_name(key)
                    curves[key] = Curve() if wanted(names[key]) else None
                log.last[names[key]] = value
                curve = curves[key]
                if curve is not None:
                    curve.add(step, value)
    log.curves = {
        names[key]: curve for key, curve in curves.items() if curve is not None and (curve.count or curve.not_finite)
    }
    log.max_steps = int(log.last["max_steps"]) if log.last.get("max_steps", 0) > 0 else None
    return log


def parse(line: str) -> dict[str, Any] | None:
    """A line as a JSON object; None if it is not one."""
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def sample_lines(path: Path, most: int = 4000) -> tuple[list[dict[str, Any]], bool]:
    """The objects of a JSONL file, or of `most` lines evenly spaced over it; and whether those are all.

    A long file is not read as a whole: evenly spaced offsets are sought, and the next full line is taken.
    """
    found: list[dict[str, Any]] = []
    if not path.is_file():
        return found, True
    size = path.stat().st_size
    with path.open("rb") as file:
        whole = size <= 1024 * most
        if whole:
            lines = list(file)
        else:
            lines = []
            last = -1
            for number in range(most):
                file.seek(size * number // most)
                if number:
                    file.readline()
                place = file.tell()
                if place > last:
                    lines.append(file.readline())
                    last = place
    for raw in lines:
        record = parse(raw.decode("utf-8", errors="replace"))
        if record is not None:
            found.append(record)
    return found, whole
