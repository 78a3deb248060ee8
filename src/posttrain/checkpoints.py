"""Which checkpoint was written to its end, by all its processes.

transformers writes `trainer_state.json` last, on the first process. The others write their random state meanwhile: each
leaves an empty file `rank-R-of-N` when it is through, so that a kill between the two is noticed. Imports no torch.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from .artifacts import check_safetensors
from .errors import ArtifactError


def mark_saves() -> Any:
    """A callback that has each process leave its mark in a checkpoint."""
    from transformers import TrainerCallback

    class MarkSaves(TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            if args.world_size > 1 and folder.is_dir():  # not where `save_total_limit` has taken it away again
                (folder / f"rank-{args.process_index}-of-{args.world_size}").touch()

    return MarkSaves()


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None. Those that a kill cut short are removed: call it on one process only."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    for checkpoint in found:
        if is_whole(checkpoint):
            return checkpoint
        shutil.rmtree(checkpoint)
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether the state is there, every tensor file has its length, and every process has left its mark."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        for file in checkpoint.rglob("*.safetensors"):
            check_safetensors(file)
    except (OSError, json.JSONDecodeError, ArtifactError):
        return False
    by_one_process = not any(checkpoint.glob("rng_state_*.pth"))
    marks = [mark.name.split("-") for mark in checkpoint.glob("rank-*-of-*")]
    return by_one_process or (bool(marks) and len(marks) == int(marks[0][3]))
