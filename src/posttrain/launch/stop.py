"""A run that is asked to stop: all its ranks save a checkpoint after the same step, and end.

Whoever asks touches the file `stop` in the run's state folder (a batch script does, when its time is nearly over). A
signal would reach ranks at different steps, or get lost while torch is imported; a file is found whenever a step ends.
The ranks agree by a maximum over all of them on a group of its own, on the CPU: no GPU waits for it.

transformers' `enable_jit_checkpoint` is not used: its ranks do not agree.
"""

import os
from pathlib import Path
from typing import Any

from ..errors import STATE, StoppedError

STOP = "stop"


def stop_file() -> Path | None:
    """Where a request to stop would be found; None when nobody could make one."""
    return Path(os.environ[STATE], STOP) if STATE in os.environ else None


def stop_if_asked(what: str) -> None:
    """For work in pieces that are kept one by one. Raises StoppedError between two of them."""
    file = stop_file()
    if file is not None and file.exists():
        raise StoppedError(f"stopped as asked, {what}; the same command goes on from there")


def stop_at_request() -> Any:
    """A callback that looks for the file after each step. Its `stopped_at` is the step, or None. Add it last."""
    import torch
    import torch.distributed as dist
    from transformers import TrainerCallback

    file = stop_file()

    class StopAtRequest(TrainerCallback):  # type: ignore[misc]
        stopped_at: int | None = None
        group: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if file is not None and args.world_size > 1:
                self.group = dist.new_group(backend="gloo")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if file is None:
                return
            asked = torch.tensor(int(file.exists()))
            if self.group is not None:
                dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.group)
            if asked and state.global_step < state.max_steps:
                self.stopped_at = state.global_step
                control.should_save = control.should_training_stop = True

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # transformers ends the epoch after a stop, wherever in the epoch that was: what is due at its end is due
            # only where it is, and then belongs into the checkpoint.
            if self.stopped_at is not None:
                at_the_end = abs(state.epoch - round(state.epoch)) < 1e-6
                control.should_evaluate = control.should_evaluate and at_the_end
                control.should_log = control.should_log and at_the_end
                control.should_save = at_the_end

    return StopAtRequest()
