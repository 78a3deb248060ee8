"""Health findings of an incomplete stage: from its alerts, or from the warnings in its stderr.

A complete PPO stage has them in its lineage. `ppo/health.py` makes them, and imports torch; this module does not.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..fileio import lines_of
from .curves import parse

ALERTS = "alerts.jsonl"  # in a run directory: {step, title, text}
_FINDING = re.compile(r"step (\d+): ([a-z][a-z ]+) \((\S+), limit (\S+)\)\. (.+)")


@dataclass(frozen=True)
class Finding:
    step: int
    what: str
    advice: str


def read_findings(lines: Iterable[str]) -> list[Finding]:
    """The findings among the lines of a log, each once."""
    matches = (m for line in lines if (m := _FINDING.search(line)))
    found = [Finding(int(m[1]), f"{m[2]}: {m[3]}, limit {m[4]}", m[5].strip()) for m in matches]
    return list(dict.fromkeys(found))


def read_alerts(run_dir: Path) -> list[Finding]:
    """The alerts of a run directory; empty if it has no file of them."""
    path = run_dir / ALERTS
    if not path.is_file():
        return []
    found = []
    for line in lines_of(path.read_text(encoding="utf-8", errors="replace")):
        alert = parse(line) or {}
        if isinstance(alert.get("step"), int):
            known = read_findings([str(alert.get("text"))])
            found += known or [Finding(alert["step"], str(alert.get("title")), str(alert.get("text")))]
    return found
