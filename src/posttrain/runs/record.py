"""A stage's own record, as JSON lines, and lines for people.

    metrics.jsonl        the numbers of each log, under the names of the dashboards: train/loss, eval/loss, time/forward
    completions.jsonl    what the policy answered, and how it was scored, where a trainer draws
    alerts.jsonl         what went wrong, when it began

Each line has its step. After a resume the lines past the checkpoint are dropped: they are about to be made again.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..fileio import lines_of, write_atomically
from .paths import ALERTS, COMPLETIONS, METRICS

# Names that say themselves what they are of.
_OWN = ("train/", "eval/", "time/", "perf/", "memory/", "energy/", "final/")


def metric_name(name: str) -> str:
    """A trainer's name for a number as dashboards have it: transformers' own rule, `eval_loss` is `eval/loss`."""
    if name.startswith(_OWN):
        return name
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


class Record:
    """The files of one run directory, open for more."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def resume(self, step: int) -> None:
        """Forget what came after `step`."""
        for name in (METRICS, COMPLETIONS, ALERTS):
            drop_lines_after(self.run_dir / name, step)

    def log(self, metrics: Mapping[str, Any], step: int, **about: Any) -> None:
        """One line of metrics.jsonl; `about` stands before the metrics: max_steps, epoch, time, left_s."""
        append(self.run_dir / METRICS, {"step": step, **about, **metrics})

    def log_completions(self, rows: list[dict[str, Any]], step: int) -> None:
        for row in rows:
            append(self.run_dir / COMPLETIONS, {"step": step, **row})

    def alert(self, title: str, text: str, step: int) -> None:
        append(self.run_dir / ALERTS, {"step": step, "title": title, "text": text})


def drop_lines_after(path: Path, step: int) -> None:
    """Keep the records up to `step`, and not the half line that a kill left."""
    if not path.is_file():
        return
    kept = [record for record in read_records(path) if record.get("step", 0) <= step]
    write_atomically(path, "".join(_line(record) for record in kept))


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file; nothing where there is none. A half line, as a kill leaves it, is passed over."""
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
