"""How a running chain is shown: as plain lines. `report.terminal` has a live view. Imports no torch."""

from pathlib import Path
from types import TracebackType
from typing import Self


class Lines:
    """Print plain lines. Also the interface of a view: `chain.run` calls these methods, in this order."""

    width = 160  # of the closing table, in characters

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def planned(self, name: str, action: str, reason: str, run_dir: Path, result: str) -> None:
        """A stage will be skipped, run or resumed; `result` is that of a skipped one."""
        print(f"{action:>6}  {name:<12} {reason}", flush=True)

    def started(self, name: str, label: str, command: str, stderr: Path) -> None:
        print(f"{label} {command}", flush=True)

    def line(self, name: str, label: str, line: str) -> None:
        """One line that the stage printed, with its line break."""
        if not line.startswith("effective configuration"):
            print(f"{label} {line}", end="", flush=True)

    def ended(self, name: str, result: str | None) -> None:
        """A stage is complete with this result, or has failed (None)."""
