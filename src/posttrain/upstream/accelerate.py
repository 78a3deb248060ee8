"""Workarounds for accelerate 1.15, and its private parts that are used."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def follow_fsdp_on_cpu() -> None:
    """Make accelerate obey `distributed_type: FSDP` on CPU processes. Call it after the arguments are made and before
    the trainer is.

    accelerate 1.15 switches to FSDP only for device kinds in a list that lacks MULTI_CPU (`AcceleratorState.__init__`),
    and silently trains with DDP instead, although torch runs fully_shard on gloo. So the process is reported to
    accelerate as MULTI_GPU; the device, the backend and everything else stay the CPU's.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    state = PartialState._shared_state
    if state.get("distributed_type") == DistributedType.MULTI_CPU:
        state["distributed_type"] = DistributedType.MULTI_GPU


def reach_samplers_behind_skips() -> None:
    """Make `set_epoch` reach the sampler of each process after a resume in the middle of an epoch.

    accelerate 1.15's DataLoaderShard.set_epoch looks two levels deep, and skipping batches adds a third: without this
    every sampler would start with the order of epoch 0 again. Safe to call again.
    """
    from accelerate.data_loader import SkipBatchSampler

    def set_epoch(self: Any, epoch: int) -> None:
        inner = self.batch_sampler
        while hasattr(inner, "batch_sampler"):
            inner = inner.batch_sampler
        if hasattr(inner.sampler, "set_epoch"):
            inner.sampler.set_epoch(epoch)

    SkipBatchSampler.set_epoch = set_epoch


def forward_before_autocast(model: "PreTrainedModel") -> Any:
    """The `forward` that accelerate's mixed precision has wrapped, or None if it is not wrapped.

    `unwrap_model` of accelerate 1.15 leaves the wrapper on, and with `keep_fp32_wrapper=False` also removes the model's
    own decorators of `forward` (huggingface/accelerate#4255).
    """
    return vars(model).get("_original_forward")


def launch_environment(config_file: Path) -> dict[str, str]:
    """The environment variables that `accelerate launch` sets in each process for a configuration, without the ranks.

    accelerate 1.15 has no public way to read a configuration without starting a script.
    """
    from unittest import mock

    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    parsed = launch_command_parser().parse_args(["--config_file", str(config_file), "script.py"])
    args, defaults, _ = _validate_launch_command(parsed)
    with mock.patch.dict(os.environ, clear=True):
        if args.use_deepspeed:
            args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
            made = prepare_deepspeed_cmd_env(args)[1]
        else:
            made = prepare_multi_gpu_env(args)
    return {k: v for k, v in made.items() if k.startswith(("ACCELERATE_", "FSDP_"))}
