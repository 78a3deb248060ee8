"""Which launch wrote a checkpoint, whether it is complete, and which launch may resume from it.

    written_by.json    processes and strategy, written by the main process after every process has written its part

transformers writes `trainer_state.json` last, but on the main process only: under DeepSpeed and FSDP another process
may still be writing. A checkpoint without written_by.json is therefore not resumed from.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError, LaunchError
from ..fileio import GIB, write_atomically
from ..log import log_line
from ..runs.fingerprints import check_safetensors
from ..runs.paths import CHECKPOINT
from .environment import Launch

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

WRITTEN_BY = "written_by.json"


def mark_whole(launch: Launch) -> Any:
    """A callback that writes WRITTEN_BY into each checkpoint after all processes have written their parts."""
    from transformers import TrainerCallback

    class Mark(TrainerCallback):  # type: ignore[misc]
        def on_save(
            self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: Any
        ) -> None:
            if launch.processes > 1:
                import torch.distributed as dist

                dist.barrier()
            if state.is_world_process_zero:
                folder = Path(args.output_dir) / f"{CHECKPOINT}{state.global_step}"
                write_atomically(folder / WRITTEN_BY, json.dumps(launch.to_dict()) + "\n")

    return Mark()


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None. Raises LaunchError when one cannot be read.

    A checkpoint that was interrupted lacks WRITTEN_BY, which is written last, or has a truncated tensor file. It is
    deleted here.
    """
    found = [p for p in folder.glob(f"{CHECKPOINT}*") if p.name.removeprefix(CHECKPOINT).isdecimal()]
    for checkpoint in sorted(found, key=lambda p: int(p.name.removeprefix(CHECKPOINT)), reverse=True):
        try:
            for file in (checkpoint / "trainer_state.json", checkpoint / WRITTEN_BY):
                json.loads(file.read_text(encoding="utf-8"))
            for file in checkpoint.rglob("*.safetensors"):
                check_safetensors(file)
        except (FileNotFoundError, ValueError, ArtifactError):
            log_line(f"{checkpoint} is incomplete, and is deleted")
            shutil.rmtree(checkpoint)
        except OSError as error:  # a disk or network failure does not make the checkpoint incomplete
            raise LaunchError(f"{checkpoint} cannot be read ({error}); fix that, and start again") from error
        else:
            return checkpoint
    return None


def check_room(trainer: "Trainer", run_dir: Path, trained: int) -> None:
    """Raise LaunchError if the disk has no room for the checkpoints and the result of `trained` parameters."""
    args = trainer.args
    # A new checkpoint is written before an old one is deleted.
    checkpoints = 0 if args.save_strategy == "no" else (args.save_total_limit or 2) + 1
    needed = trained * (4 + checkpoints * (4 if args.save_only_model else 12))  # fp32: weights, Adam's two moments
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise LaunchError(
            f"{run_dir}: {free / GIB:.1f} GiB free, about {needed / GIB:.1f} GiB needed for checkpoints "
            "and the result; free some space, or change output_dir"
        )


def check_resumable(checkpoint: Path, launch: Launch) -> None:
    """Raise LaunchError if the checkpoint was written by a launch with other copies of the model or other files.

    With another number of copies, a step would be over another number of rows; another strategy writes weights and
    optimizer to other files. Offload does not change the files, nor does tensor or pipeline parallelism, whose
    checkpoints are those of a single process.
    """
    wrote = Launch(**json.loads((checkpoint / WRITTEN_BY).read_text(encoding="utf-8")))
    if (wrote.copies, _files(wrote)) == (launch.copies, _files(launch)):
        return
    why = (
        "a step would be over another number of rows"
        if wrote.copies != launch.copies
        else "weights and optimizer are in other files"
    )
    raise LaunchError(
        f"{checkpoint} was written by {wrote}, and this is {launch}: {why}. Launch as before, or choose another "
        "output_dir to start over"
    )


def _files(launch: Launch) -> str:
    return "plain" if launch.strategy in ("one", "ddp") else launch.strategy
