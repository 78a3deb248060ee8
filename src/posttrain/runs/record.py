"""The record of a stage, as files of JSON lines.

    metrics.jsonl        the numbers of each log, named as in the dashboards: train/loss, eval/loss, time/forward
    completions.jsonl    sampled completions and their scores, if the trainer draws any
    alerts.jsonl         problems, each at the step where it began

Each line has its step. A resume drops lines after its checkpoint, since those steps are trained again.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..fileio import lines_of, write_atomically
from .paths import ALERTS, COMPLETIONS, METRICS

# Names that already have a prefix.
_OWN = ("train/", "eval/", "time/", "perf/", "memory/", "energy/", "final/")


def metric_name(name: str) -> str:
    """A trainer's name of a metric as dashboards have it, by transformers' rule: `eval_loss` becomes `eval/loss`."""
    if name.startswith(_OWN):
        return name
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


class Record:
    """The record's files in one run directory, appended to."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def resume(self, step: int) -> None:
        """Drop the lines after `step`."""
        for name in (METRICS, COMPLETIONS, ALERTS):
            drop_lines_after(self.run_dir / name, step)

    def log(self, metrics: Mapping[str, Any], step: int, **about: Any) -> None:
        """Append one line to metrics.jsonl; `about` comes before the metrics: max_steps, epoch, time, left_s."""
        append(self.run_dir / METRICS, {"step": step, **about, **metrics})

    def log_completions(self, rows: list[dict[str, Any]], step: int) -> None:
        for row in rows:
            append(self.run_dir / COMPLETIONS, {"step": step, **row})

    def alert(self, title: str, text: str, step: int) -> None:
        append(self.run_dir / ALERTS, {"step": step, "title": title, "text": text})


def drop_lines_after(path: Path, step: int) -> None:
    """Keep the records up to `step`; a half line, left by a kill, is dropped too."""
    if not path.is_file():
        return
    kept = [record for record in read_records(path) if record.get("step", 0) <= step]
    write_atomically(path, "".join(_line(record) for record in kept))


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, none if it does not exist. A half line, left by a kill, is skipped."""
    if not path.is_file():
        return
    for line in lines_of(path.read_text(encoding="utf-8")):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(record))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, default=str, ensure_ascii=False) + "\n"
