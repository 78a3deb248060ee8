"""What a running chain calls to be shown: plain lines. `report.terminal` has a live view. Imports no torch."""

from pathlib import Path
from types import TracebackType
from typing import Self


class Lines:
    """Plain lines, as they come. Also what a view is: `chain.run` calls these, in this order."""

    width = 160  # of the closing table, in signs

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def planned(self, name: str, action: str, reason: str, run_dir: Path, result: str) -> None:
        """A stage will be skipped, run or resumed; `result` is what a skipped one has shown."""
        print(f"{action:>6}  {name:<12} {reason}", flush=True)

    def started(self, name: str, label: str, command: str, stderr: Path) -> None:
        print(f"{label} {command}", flush=True)

    def line(self, name: str, label: str, line: str) -> None:
        """One line that the stage printed, with its end."""
        if not line.startswith("effective configuration"):
            print(f"{label} {line}", end="", flush=True)

    def ended(self, name: str, result: str | None) -> None:
        """A stage is complete with this result, or has failed (None)."""
