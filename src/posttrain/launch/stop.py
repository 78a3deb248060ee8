"""Stops a run on request: all its ranks save a checkpoint after the same step, and end.

A request is the file `stop` in the run's state folder; a batch script makes it shortly before its time limit. A signal
would reach ranks at different steps, or get lost while torch is imported; the file is looked for after each step. The
ranks agree by a maximum over all of them in a group of its own, on the CPU: no GPU waits for it.

transformers' `enable_jit_checkpoint` is not used: its ranks do not agree.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import STATE, StoppedError

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

STOP = "stop"


def stop_file() -> Path | None:
    """The path of a request to stop; None if the run has no state folder."""
    return Path(os.environ[STATE], STOP) if STATE in os.environ else None


def stop_if_asked(what: str) -> None:
    """Raise StoppedError if a stop was requested. For work whose pieces are saved one by one."""
    file = stop_file()
    if file is not None and file.exists():
        raise StoppedError(f"stopped as asked, {what}; the same command resumes there")


def stop_at_request() -> Any:
    """A callback that looks for the file after each step, and raises StoppedError once the checkpoint is saved.

    Add it last: when it raises, all other callbacks have run for that step.
    """
    import torch
    import torch.distributed as dist
    from transformers import TrainerCallback

    file = stop_file()

    class StopAtRequest(TrainerCallback):  # type: ignore[misc]
        stopping = postponed = False
        group: Any = None

        def on_train_begin(
            self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any
        ) -> None:
            if file is not None and args.world_size > 1:
                self.group = dist.new_group(backend="gloo")

        def on_step_end(
            self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any
        ) -> None:
            if file is None or state.global_step >= state.max_steps:
                return
            asked = torch.tensor(int(file.exists()))
            if self.group is not None:
                dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.group)
            # The events of an epoch's end, such as an evaluation, come after its last step, and a resumed run would
            # skip them: stop one step later, unless every step is the last one of its epoch.
            if asked and state.epoch == int(state.epoch) and not self.postponed:
                self.postponed = True
            elif asked:
                self.stopping = control.should_save = True

        def on_save(
            self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any
        ) -> None:
            if not self.stopping:
                return
            if self.group is not None:
                dist.barrier(group=self.group)  # every rank has written its part
            raise StoppedError(f"stopped as asked, after step {state.global_step}; the same command resumes there")

    return StopAtRequest()
