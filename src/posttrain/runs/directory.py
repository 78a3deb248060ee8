"""Whose a run directory is: taken and locked.

stage.json     whose it is, by the stage's key; written when it is taken
.lock          held while a process works there
checkpoints/   until the stage is complete
"""

import fcntl
import json
import time
from pathlib import Path
from typing import IO

from ..errors import ArtifactError, LaunchError
from ..fileio import write_atomically
from .lineage import is_complete, read_lineage
from .paths import ADAPTER, CHECKPOINT, CHECKPOINTS, DRAWN, LOCK, MARKER, METRICS, MODEL


def take_directory(run_dir: Path, key: str, recipe: str, *, wait_s: float = 0) -> IO[str]:
    """Mark `run_dir` as this run's, or refuse it; the lock on it, to be kept (`lock`).

    Raises ArtifactError for a directory with something else in it, LaunchError for one where another process works.
    """
    marker = run_dir / MARKER
    if not marker.is_file() and run_dir.exists() and any(p.name != LOCK for p in run_dir.iterdir()):
        raise ArtifactError(f"output_dir: {run_dir} is not empty and was not made by posttrain; choose another")
    run_dir.mkdir(parents=True, exist_ok=True)
    held = lock(run_dir, wait_s=wait_s)
    try:
        _check_owner(run_dir, key)
    except ArtifactError:
        held.close()
        raise
    write_atomically(marker, json.dumps({"key": key, "recipe": recipe}) + "\n")
    return held


def _check_owner(run_dir: Path, key: str) -> None:
    """Refuse what another run has left there, and what is complete. Raises ArtifactError."""
    marker = run_dir / MARKER
    if is_complete(run_dir):
        owner = read_lineage(run_dir)
        same = "this very run, complete" if owner.key == key else f"another run ({owner.recipe}, key {owner.key[:12]})"
        raise ArtifactError(f"output_dir: {run_dir} holds {same}; choose another output_dir, or move that one away")
    if marker.is_file():
        owner_key = json.loads(marker.read_text(encoding="utf-8"))["key"]
        if owner_key != key and _has_work(run_dir):
            raise ArtifactError(
                f"output_dir: {run_dir} holds an unfinished run with another configuration (key {owner_key[:12]}, "
                f"this one is {key[:12]}); choose another output_dir, or move that one away"
            )


def _has_work(run_dir: Path) -> bool:
    """Whether something was computed there; a run that was refused for its data leaves nothing to keep."""
    return any((run_dir / CHECKPOINTS).glob(f"{CHECKPOINT}*")) or any(
        (run_dir / name).exists() for name in (METRICS, DRAWN, ADAPTER, MODEL)
    )


def lock(run_dir: Path, *, wait_s: float = 0) -> IO[str]:
    """Hold the run directory for as long as the file that is returned is open: two writers would tear its checkpoints.

    Raises LaunchError when another process still holds it after `wait_s`. The kernel lets go when the holder ends,
    however it ends.
    """
    file = (run_dir / LOCK).open("a")
    end = time.monotonic() + max(wait_s, 1)  # a report that looks whether it is held, holds it for a moment
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() < end:
                time.sleep(0.2)
                continue
            raise LaunchError(f"output_dir: another process is training in {run_dir}; wait for it or end it") from error
        return file
