"""Checks that accelerate and the trainer train as the launch asked for."""

from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, LaunchError
from .environment import Launch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainerControl, TrainerState, TrainingArguments


def check_state(args: "TrainingArguments", launch: Launch) -> None:
    """Check world size, devices and backend once the trainer's arguments exist. Raises LaunchError."""
    import torch
    import torch.distributed as dist

    if args.world_size != launch.processes:
        raise LaunchError(
            f"{launch.processes} processes were launched, but each trains as one of {args.world_size}: see "
            "accelerate_configs/"
        )
    if args.n_gpu > 1:
        raise LaunchError(
            f"{args.n_gpu} GPUs are visible to one process, which would use torch's slow DataParallel: launch with "
            f"accelerate_configs/ddp.yaml and num_processes: {args.n_gpu}, or set CUDA_VISIBLE_DEVICES=0"
        )
    if launch.processes == 1:
        return
    wanted, found = "nccl" if args.device.type == "cuda" else "gloo", backends()
    if found.get(args.device.type) != wanted:
        raise LaunchError(
            f"the processes communicate by {found}, but tensors on {args.device.type} need {wanted}: leave ddp_backend "
            "out" + ("" if torch.cuda.is_available() else "; no GPU was found")
        )
    assert dist.get_world_size() == launch.processes


def backends() -> dict[str, str]:
    """The backend for the tensors of each kind of device."""
    import torch.distributed as dist

    pairs = (pair.partition(":") for pair in dist.get_backend_config().split(","))
    return {device: backend for device, _, backend in pairs}


def check_trainer(trainer: "Trainer", launch: Launch) -> None:
    """Check processes, strategy and precision once the trainer is made. Raises LaunchError."""
    accelerator, args = trainer.accelerator, trainer.args
    if accelerator.num_processes != launch.processes:
        raise LaunchError(
            f"{launch.processes} processes were launched, but each trains as one of {accelerator.num_processes}: see "
            "accelerate_configs/"
        )
    on_cpu = args.device.type == "cpu"
    wanted = {"one": "NO", "ddp": "MULTI_CPU" if on_cpu else "MULTI_GPU", "fsdp2": "FSDP"}
    found = str(accelerator.distributed_type.value)
    if found != wanted.get(launch.strategy, "DEEPSPEED"):
        raise LaunchError(f"{launch} was launched, but accelerate trains as {found}: see accelerate_configs/")
    if trainer.is_deepspeed_enabled and f"zero{accelerator.state.deepspeed_plugin.zero_stage}" != launch.strategy:
        raise LaunchError(
            f"{launch} was launched, but DeepSpeed's stage is {accelerator.state.deepspeed_plugin.zero_stage}"
        )
    asked = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    # DeepSpeed keeps the precision in its own configuration; accelerate's is "no" until the engine is made.
    precision = accelerator.state.deepspeed_plugin.hf_ds_config if trainer.is_deepspeed_enabled else None
    is_on = (
        {name for name in ("bf16", "fp16") if precision.get_value(f"{name}.enabled") in (True, "true")}
        if precision is not None
        else {accelerator.mixed_precision} - {"no"}
    )
    if is_on != {asked} - {"no"}:
        raise LaunchError(f"{asked} was asked for, but accelerate trains in {', '.join(sorted(is_on)) or 'fp32'}")
    if args.fp16 and on_cpu:
        raise LaunchError("fp16 was asked for, but there is no loss scaling on a CPU: it would train in fp32")


def watch_wrapper(trainer: "Trainer", launch: Launch) -> Any:
    """A callback that runs `check_wrapped` on `trainer`'s model before the first step, and so may raise LaunchError."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(
            self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: Any
        ) -> None:
            precision = "bf16" if args.bf16 else "fp16" if args.fp16 else ""
            split = bool(getattr(trainer, "is_distributed_loading_by_transformers", False))
            check_wrapped(trainer.model_wrapped, launch, precision=precision, splits_itself=split)

    return Watch()


def check_wrapped(
    model: "PreTrainedModel", launch: Launch, *, precision: str = "", splits_itself: bool = False
) -> None:
    """Check that the model is wrapped as the strategy requires, and computes in `precision`. Raises LaunchError.

    With `splits_itself` the trainer splits the model over processes without a wrapper.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    kinds = [cls.__name__ for cls in type(model).__mro__]
    fits = {
        "one": not isinstance(model, (DistributedDataParallel, DataParallel, FSDPModule)),
        "ddp": isinstance(model, DistributedDataParallel) or splits_itself,
        "fsdp2": isinstance(model, FSDPModule),
    }.get(launch.strategy, "DeepSpeedEngine" in kinds)
    if not fits:
        raise LaunchError(
            f"{launch} was launched, but the model that trains is a bare {type(model).__name__}: gradients would not "
            "be shared; see accelerate_configs/"
        )
    if launch.strategy.startswith("zero") and f"zero{model.zero_optimization_stage()}" != launch.strategy:
        raise LaunchError(f"{launch} was launched, but DeepSpeed trains in stage {model.zero_optimization_stage()}")
    if launch.strategy == "fsdp2":
        from torch.distributed.tensor import DTensor

        whole = [name for name, p in model.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
        if whole and launch.processes > 1:
            raise LaunchError(f"{launch} was launched, but {len(whole)} trained parameters are not sharded: {whole[0]}")
    if precision and launch.strategy.startswith("zero"):
        on = {"bf16": model.bfloat16_enabled(), "fp16": model.fp16_enabled()}[precision]
        if not on:
            raise LaunchError(f"{precision} was asked for, but DeepSpeed computes in another format")


def check_deepspeed_bf16(trainer: "Trainer", dtype: str) -> None:
    """Raise ConfigError for bf16 with fp32 weights under DeepSpeed, which would round the weights themselves."""
    if trainer.is_deepspeed_enabled and trainer.args.bf16 and dtype == "float32":
        raise ConfigError(
            "bf16: true under DeepSpeed rounds the weights themselves: set dtype: bfloat16, or bf16: false"
        )
