"""What accelerate 1.15 does in another way than is wanted, and what it keeps to itself."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def follow_fsdp_on_cpu() -> None:
    """Have accelerate follow `distributed_type: FSDP` on CPU processes. Call it between the arguments and the trainer.

    accelerate 1.15 turns to FSDP from a list of device kinds that lacks MULTI_CPU (`AcceleratorState.__init__`), and
    trains with DDP without a word. torch runs fully_shard on gloo. So the process is shown to accelerate as one
    of a listed kind; the device, the backend and everything else stay the CPU's.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    state = PartialState._shared_state
    if state.get("distributed_type") == DistributedType.MULTI_CPU:
        state["distributed_type"] = DistributedType.MULTI_GPU


def reach_samplers_behind_skips() -> None:
    """After a resume in the middle of an epoch, tell the sampler on each of several processes which epoch it is.

    accelerate 1.15's DataLoaderShard.set_epoch looks two levels deep, and a skip in front of a process's share of the
    batches is a third: without this every sampler begins with the order of epoch 0 again. Safe to call again.
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
    """The `forward` that accelerate's mixed precision has wrapped; None where it has wrapped none.

    `unwrap_model` of accelerate 1.15 leaves the wrapper on. Its `keep_fp32_wrapper=False` takes too much off: every
    decorator that `forward` has of its own (huggingface/accelerate#4255).
    """
    return vars(model).get("_original_forward")


def launch_environment(config_file: Path) -> dict[str, str]:
    """What `accelerate launch` puts into the environment of each of several processes for a configuration; no ranks.

    accelerate 1.15 offers no way to read a configuration without starting a script.
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
