"""Exit codes and messages that the processes of a launch left in files (`errors.run_main`). Imports no torch.

The folder is the environment's POSTTRAIN_STATE. A chain sets one for each stage that it launches here, and a batch
script for each job. A run also looks there for the file `stop`, which asks it to stop (`stop.py`).
"""

import json
import re
from pathlib import Path
from typing import Any

from .stop import STOP


def clear_state(state: Path) -> None:
    """Make a launch's state folder, or remove an earlier launch's exit files and request to stop."""
    state.mkdir(parents=True, exist_ok=True)
    for path in (*state.glob("exit-*.rank-*"), state / STOP):
        path.unlink(missing_ok=True)


def read_reports(state: Path) -> list[dict[str, Any]]:
    """Exit code and message per rank of the last start, in order of time. A file is empty if the disk was full."""
    reports = []
    for path in state.glob("exit-*.rank-*"):
        code, rank = re.fullmatch(r"exit-(\d+)\.rank-(\d+)", path.name).groups()  # type: ignore[union-attr]
        report = {"rank": int(rank), "node": "?", "time": path.stat().st_mtime, "message": ""}
        text = path.read_text(encoding="utf-8")
        if text:
            report |= json.loads(text)
        reports.append({**report, "code": int(code)})
    return sorted(reports, key=lambda r: r["time"])
