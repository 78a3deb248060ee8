"""The number format that this machine trains in, decided before anything is loaded.

bf16 is used where the processor has it in hardware: on CUDA from Ampere on, on CPUs with AVX512-BF16 or AMX. On other
CPUs it is emulated, and slower than fp32 by two orders of magnitude.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..log import world_size
from .floats import BF16, FP16

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def has_bf16() -> bool:
    """Whether this machine multiplies bf16 in hardware."""
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def decide(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in `bf16`, `use_cpu` and `ddp_backend` of a trainer's values.

    accelerate's `mixed_precision` decides if the recipe does not. Raises ConfigError for a precision that the machine
    or DeepSpeed does not support.
    """
    import torch

    cuda, deepspeed = torch.cuda.is_available(), os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    decided = dict(values)
    launched_in = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched_in != "no":
        if launched_in not in ("bf16", "fp16"):
            raise ConfigError(f"mixed_precision: {launched_in} is not supported; accepted: bf16, fp16, 'no'")
        other = "fp16" if launched_in == "bf16" else "bf16"
        if decided.get(launched_in) is False or decided.get(other):
            raise ConfigError(
                f"accelerate's configuration says mixed_precision: {launched_in}, the recipe's {launched_in}: "
                f"{decided.get(launched_in)}, {other}: {decided.get(other)}; say it once: keep mixed_precision: 'no'"
            )
        decided |= {launched_in: True, other: False}
    on_cpu = decided["use_cpu"] = bool(decided.get("use_cpu")) or not cuda
    if decided.get("fp16") and on_cpu:
        raise ConfigError(
            "fp16: true needs a GPU (accelerate scales no loss on a CPU); use bf16: true or leave both out"
        )
    if deepspeed and on_cpu:
        if cuda:
            raise ConfigError(
                "use_cpu: true would leave DeepSpeed out; leave it out, or use accelerate_configs/ddp.yaml"
            )
        if decided.get("bf16"):
            raise ConfigError("bf16: true under DeepSpeed needs a GPU; leave it out")
        decided |= {"use_cpu": False, "bf16": False}  # with use_cpu, accelerate would leave DeepSpeed out
    if on_cpu and world_size() > 1:
        decided["ddp_backend"] = "gloo"
    if decided.get("bf16") is None:
        decided["bf16"] = has_bf16() and not decided.get("fp16")
    return decided


def describe_weights(model: "PreTrainedModel") -> str | None:
    """A note if 16-bit weights are trained without fp32 copies, so that small updates are rounded away; else None.

    That happens in full fine-tuning with `dtype: bfloat16`, in the new head of an adapter on a bf16 base (PEFT upcasts
    adapter layers only), and in TRL's adapters on a 4-bit base. Do not call it under DeepSpeed, which keeps fp32
    masters.
    """
    import torch

    formats = {torch.bfloat16: BF16, torch.float16: FP16}
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained if p.dtype in formats)
    if not count:
        return None
    dtype = next(p.dtype for p in trained if p.dtype in formats)
    described = (
        f"{count:,} of {sum(p.numel() for p in trained):,} trained parameters are {str(dtype).removeprefix('torch.')} "
        f"without an fp32 master: an update below 1/{round(2 / formats[dtype].lost_beside_one)} of a weight is rounded "
        "away (docs/precision.md)"
    )
    if getattr(model, "is_loaded_in_4bit", False):
        return described
    return f"{described}; dtype: float32 keeps it, and bf16: true computes in bf16 all the same"


def take_off_autocast(model: "PreTrainedModel") -> None:
    """Remove accelerate's autocast wrapper from a model, so that it computes as it will when it is loaded again."""
    from ..upstream.accelerate import forward_before_autocast

    own = forward_before_autocast(model)
    if own is not None:
        model.forward = own


@contextmanager
def without_autocast(model: "PreTrainedModel") -> Iterator[None]:
    """`take_off_autocast` within the block."""
    wrapped = vars(model).get("forward")
    take_off_autocast(model)
    try:
        yield
    finally:
        if wrapped is not None:
            model.forward = wrapped
