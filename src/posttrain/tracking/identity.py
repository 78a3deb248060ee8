"""The identity of a run directory in each dashboard. Imports no torch."""

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..fileio import write_atomically
from ..runs.paths import OWNER, RUN

ALIAS = 12  # characters of a digest
LONE = "posttrain"  # the default project of a stage without a chain


def project_of(chain: str | None) -> str:
    return chain or LONE


def as_cell(value: Any) -> Any:
    """A value as a number or text for a table; a conversation is one line per turn, any other list is joined."""
    if value is None or isinstance(value, (int, float, str)):
        return value
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in value)
    return " | ".join(map(str, value)) if isinstance(value, list) else str(value)


@dataclass(frozen=True)
class Identity:
    """The run in every dashboard: the runs of a chain are one group, and each stage is a job type."""

    chain: str | None
    stage: str
    recipe: str
    key: str
    id: str  # from the stage's key and this directory, so that a resume keeps it
    run_dir: Path

    @property
    def group(self) -> str:
        return self.chain or self.stage

    @property
    def home(self) -> Path:
        """The folder shared by a chain's stages; for a stage without a chain, its own."""
        return self.run_dir.parent if self.chain else self.run_dir


def identify(run_dir: Path, key: str, recipe: str) -> Identity:
    """The identity recorded in this directory, or a new one."""
    run_dir = run_dir.resolve()
    owner = run_dir.parent / OWNER
    chain = json.loads(owner.read_text(encoding="utf-8"))["name"] if owner.is_file() else None
    kept = read_run(run_dir)
    run_id = kept["id"] if kept.get("key") == key else f"{key[:12]}-{secrets.token_hex(3)}"
    if kept.get("id") != run_id:
        write_atomically(run_dir / RUN, json.dumps({"key": key, "id": run_id}) + "\n")
    return Identity(chain, run_dir.name, recipe, key, run_id, run_dir)


def note(run_dir: Path, **facts: Any) -> None:
    """Record more values beside a run's identity."""
    write_atomically(run_dir / RUN, json.dumps({**read_run(run_dir), **facts}, indent=2) + "\n")


def read_run(run_dir: Path) -> dict[str, Any]:
    """What is recorded of a run: its key and id, and its place in each dashboard."""
    path = run_dir / RUN
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
