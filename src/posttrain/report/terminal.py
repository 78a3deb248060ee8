"""How a running chain is shown: as plain lines, or on a terminal as a live view that is redrawn in place.

`Lines` prints the output of the stages. `LiveView` shows stages, progress bars, the metrics of the running stage with
sparklines, and its health findings; the stages' full output is in the chain's `.logs/`. Imports no torch.
"""

import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..chain.view import Lines
from ..redact import clean
from ..runs.paths import METRICS
from .curves import Curve, parse, trainer_name
from .health import Finding, read_findings

_STEP = re.compile(r"^step (\d+)/(\d+)\b")
_BLOCKS = "▁▂▃▄▅▆▇█"
SPARKS, METRICS_SHOWN, FINDINGS_SHOWN = 24, 4, 3

# The metrics of a running stage, the most important first.
_TELLING = (
    "objective/scores", "objective/kl", "objective/entropy", "rewards/margins", "rewards/accuracies", "accuracy",
    "eval_f1", "loss", "eval_loss", "mean_token_accuracy",
)  # fmt: skip


def choose_view(title: str, *, plain: bool = False) -> "Lines":
    """The live view if stdout is a terminal that can be redrawn; plain lines otherwise, or with `plain`."""
    from rich.console import Console

    console = Console()
    if plain or not sys.stdout.isatty() or not console.is_terminal or console.is_dumb_terminal:
        return Lines()
    return LiveView(title, console)


@dataclass
class Tail:
    """The new lines of a growing file since the last read."""

    path: Path
    place: int = 0
    rest: bytes = b""

    def read(self) -> tuple[bool, list[str]]:
        """(whether the file was rewritten, its new complete lines)."""
        if not self.path.is_file():
            return False, []
        anew = self.path.stat().st_size < self.place
        if anew:
            self.place, self.rest = 0, b""
        with self.path.open("rb") as file:
            file.seek(self.place)
            data = file.read()
        self.place += len(data)
        *lines, self.rest = (self.rest + data).split(b"\n")
        return anew, [line.decode("utf-8", errors="replace") for line in lines]


@dataclass
class StageView:
    """The state of one stage while the chain runs."""

    name: str
    state: str  # skip | waiting | running | complete | failed
    run_dir: Path
    result: str = ""
    begun: float = 0.0
    took: float = 0.0
    step: int = 0
    max_steps: int = 0
    left_s: float | None = None
    curves: dict[str, Curve] = field(default_factory=dict)
    last_line: str = ""
    findings: list[Finding] = field(default_factory=list)
    log: Tail | None = None
    stderr: Tail | None = None

    def look(self) -> None:
        """Read what the stage has written since the last call."""
        if self.log is not None:
            anew, lines = self.log.read()
            if anew:
                self.curves.clear()
            for line in lines:
                self._take(parse(line) or {})
        if self.stderr is not None:
            self.findings += [f for f in read_findings(self.stderr.read()[1]) if f not in self.findings]

    def _take(self, record: dict[str, Any]) -> None:
        step = record.get("step")
        if not isinstance(step, int):
            return
        self.step, self.max_steps = step, record.get("max_steps") or self.max_steps
        self.left_s = record.get("left_s", self.left_s)
        for name, value in record.items():
            key = trainer_name(name)
            if key in _TELLING and isinstance(value, (int, float)):
                curve = self.curves.setdefault(key, Curve())
                curve.add(step, value)
                if curve.not_finite == 1 and not any(f.what == f"{key} is not finite" for f in self.findings):
                    self.findings.append(Finding(step, f"{key} is not finite", "Lower learning_rate."))


class LiveView(Lines):
    """One view of the whole chain, redrawn in place twice per second."""

    def __init__(self, title: str, console: Any) -> None:
        from rich.live import Live

        self.title, self.console = title, console
        self.width = min(self.width, console.width)
        self.stages: dict[str, StageView] = {}
        self.begun = time.monotonic()
        self.live = Live(
            console=console, get_renderable=self.render, refresh_per_second=2, vertical_overflow="ellipsis"
        )

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.live.stop()

    def planned(self, name: str, action: str, reason: str, run_dir: Path, result: str) -> None:
        state = "skip" if action == "skip" else "waiting"
        self.stages[name] = StageView(name, state, run_dir, result or (f"{action}: {reason}" if reason else action))

    def started(self, name: str, label: str, command: str, stderr: Path) -> None:
        stage = self.stages[name]
        stage.state, stage.begun = "running", time.monotonic()
        stage.log = Tail(stage.run_dir / METRICS)
        stage.stderr = Tail(stderr, place=stderr.stat().st_size if stderr.is_file() else 0)

    def line(self, name: str, label: str, line: str) -> None:
        stage = self.stages[name]
        stage.last_line = line.strip()
        if found := _STEP.match(line):
            stage.step, stage.max_steps = int(found[1]), int(found[2])

    def ended(self, name: str, result: str | None) -> None:
        stage = self.stages[name]
        stage.look()
        stage.took = time.monotonic() - stage.begun
        stage.state, stage.result = ("failed", "") if result is None else ("complete", result)

    def render(self) -> Any:
        """The current view."""
        from rich.console import Group
        from rich.text import Text

        done = sum(s.state in ("skip", "complete") for s in self.stages.values())
        clock = _clock(time.monotonic() - self.begun)
        rows: list[Any] = [
            Text.assemble((clean(self.title), "bold"), f"  {done} of {len(self.stages)} stages complete  {clock}")
        ]
        for stage in list(self.stages.values()):
            if stage.state == "running":
                stage.look()
            rows += _rows(stage)
        findings = [(s.name, f) for s in self.stages.values() for f in s.findings]
        for name, finding in findings[-FINDINGS_SHOWN:]:
            text = f"! {name}, step {finding.step}: {finding.what}. {finding.advice}"
            rows.append(Text(clean(text), style="yellow", no_wrap=True, overflow="ellipsis"))
        return Group(*rows)


_SIGNS = {"skip": "✓", "complete": "✓", "running": "▶", "waiting": "○", "failed": "✗"}
_STYLES = {"skip": "green", "complete": "green", "running": "bold", "waiting": "dim", "failed": "red"}


def _rows(stage: StageView) -> list[Any]:
    """The lines of one stage: one line; for the running stage also its bar, its metrics and its last output."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    line = Table.grid(padding=(0, 1), expand=True)
    line.add_column(width=16, no_wrap=True, overflow="ellipsis")
    head = Text(f"{_SIGNS[stage.state]} {clean(stage.name)}", style=_STYLES[stage.state])
    if stage.state != "running":
        words = {"skip": "was complete", "complete": f"{stage.took:.0f} s", "failed": "failed"}.get(stage.state, "")
        line.add_column(width=12, no_wrap=True)
        line.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        line.add_row(
            head, Text(words, style="dim"), Text(clean(stage.result), style="dim" * (stage.state == "waiting"))
        )
        return [line]
    line.add_column(ratio=1)
    line.add_column(no_wrap=True, justify="right")
    steps = f"{stage.step}/{stage.max_steps}" if stage.max_steps else "starting"
    left = f"  {_clock(stage.left_s)} left" if stage.left_s else ""
    bar = ProgressBar(total=max(1, stage.max_steps), completed=stage.step, pulse=False)
    line.add_row(head, bar, Text(f"{steps}  {_clock(time.monotonic() - stage.begun)}{left}"))
    metrics = Table.grid(padding=(0, 2))
    for width in (22, SPARKS, 10):  # fixed, so that columns stay in place while numbers change
        metrics.add_column(no_wrap=True, width=width)
    for key in [k for k in _TELLING if k in stage.curves][:METRICS_SHOWN]:
        curve = stage.curves[key]
        metrics.add_row(Text(f"  {key}"), Text(sparkline(curve), style="cyan"), Text(f"{curve.last:.4g}"))
    last = Text(f"  {clean(stage.last_line)}", style="dim", no_wrap=True, overflow="ellipsis")
    return [line, *([metrics] if metrics.row_count else []), last]


def sparkline(curve: Curve, width: int = SPARKS) -> str:
    """The means of a curve as block characters, at most `width`, scaled from its minimum to its maximum."""
    means = [mean for _, _, mean, _ in curve.points]
    if not means:
        return ""
    size = -(-len(means) // width)
    groups = [means[i : i + size] for i in range(0, len(means), size)]
    heights = [sum(g) / len(g) for g in groups]
    low, high = min(heights), max(heights)
    if high == low:
        return _BLOCKS[0] * len(heights)
    return "".join(_BLOCKS[int((h - low) / (high - low) * (len(_BLOCKS) - 1) + 0.5)] for h in heights)


def _clock(seconds: float) -> str:
    """Minutes and seconds, or hours and minutes."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
