"""What the processes of a launch ended with, as they left it in files (`errors.run_main`). Imports no torch.

The folder is the environment's POSTTRAIN_STATE: a chain gives one to each stage that it launches here, and a batch
script to each job. There a run also looks for the file `stop`, which asks it to stop (`stop.py`).
"""

import json
import re
from pathlib import Path
from typing import Any

from .stop import STOP


def clear_state(state: Path) -> None:
    """Make a launch's state folder, or empty it of what an earlier launch left, a request to stop included."""
    state.mkdir(parents=True, exist_ok=True)
    for path in (*state.glob("exit-*.rank-*"), state / STOP):
        path.unlink(missing_ok=True)


def read_reports(state: Path) -> list[dict[str, Any]]:
    """What the ranks of the last start ended with, the first one first. A file is empty where the disk was full."""
    reports = []
    for path in state.glob("exit-*.rank-*"):
        code, rank = re.fullmatch(r"exit-(\d+)\.rank-(\d+)", path.name).groups()  # type: ignore[union-attr]
        report = {"rank": int(rank), "node": "?", "time": path.stat().st_mtime, "message": ""}
        text = path.read_text(encoding="utf-8")
        if text:
            report |= json.loads(text)
        reports.append({**report, "code": int(code)})
    return sorted(reports, key=lambda r: r["time"])
