"""Findings of PPO's health watch, as a running or cut off stage's stderr has them: warnings, one line each.

A complete stage has them in its lineage. `ppo/health.py` writes them, and imports torch; this does not.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_FINDING = re.compile(r"step (\d+): ([a-z][a-z ]+) \((\S+), limit (\S+)\)\. (.+)")


@dataclass(frozen=True)
class Finding:
    step: int
    what: str
    advice: str


def read_findings(lines: Iterable[str]) -> list[Finding]:
    """Each finding among the lines of a log, once."""
    matches = (m for line in lines if (m := _FINDING.search(line)))
    found = [Finding(int(m[1]), f"{m[2]}: {m[3]}, limit {m[4]}", m[5].strip()) for m in matches]
    return list(dict.fromkeys(found))
