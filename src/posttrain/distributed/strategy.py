"""What a launch's strategy needs before the trainer's arguments are made, after that, and after training."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..upstream.accelerate import follow_fsdp_on_cpu
from . import checks, deepspeed, deepspeed_build, environment, fsdp
from .environment import Launch

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


def read_launch(recipe: str, values: Mapping[str, Any]) -> Launch:
    """The launch of this process, with the tensor and pipeline parallel sizes in a stage's `values`. Imports no torch.

    Raises LaunchError for a launch that cannot be what was meant.
    """
    launch = environment.check_launch(recipe)
    sizes = (int(values.get(f"{kind}_parallel_size", 1)) for kind in ("tensor", "pipeline"))
    if launch.strategy.startswith("zero"):
        deepspeed_build.use()
    return dataclasses.replace(launch, split=math.prod(sizes))


def prepare(args: "TrainingArguments", launch: Launch) -> None:
    """Check what accelerate has made of the launch, and disable ZeRO-3's partitioning while models are loaded.

    Call it once `args` are made.

    Raises LaunchError.
    """
    checks.check_state(args, launch)
    if launch.strategy == "fsdp2":
        follow_fsdp_on_cpu()
    deepspeed.disable_zero3_init()


def gather_trained(trainer: "Trainer") -> None:
    """Gather the trained parameters on every process, so that measuring and saving are as on a single process."""
    deepspeed.gather_full_parameters(trainer)
    fsdp.gather_full_parameters(trainer)
