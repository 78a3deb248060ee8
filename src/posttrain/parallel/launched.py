"""Is this process in what was asked for? Checked three times, each as early as it can be known; never silently another.

    check_launch     from the environment, before anything heavy is imported
    meet             every process is here and is about to do the same, before weights are read
    check_state      what accelerate has made of it, before weights are read
    check_wrapped    what the trainer has made of the model, before the first step

What accelerate 1.15 would pass over: a MULTI_CPU configuration starts one process, whatever its num_processes; with
use_cpu set DeepSpeed is left out; processes without a launcher train copies, each alone; several GPUs in one process
become torch's DataParallel. Left out: whether the numbers are right, which tests/distributed compares.
"""

import atexit
import itertools
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ConfigError, LaunchError

FOLDER_S = 10  # until a folder that another machine has made is seen: network file systems remember what was not there
MEETING_S = 60  # how long a process waits for the others to come, unless ddp_timeout is shorter
_meetings = itertools.count()
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Launch:
    """What was asked for, by the environment that accelerate gives a process."""

    processes: int
    strategy: str  # one, ddp, zero0 to zero3, fsdp2
    offload: str = ""  # what is kept in the host's memory: "", optimizer, parameters, or optimizer+parameters
    split: int = 1  # processes that one model is split over by tensor and pipeline parallelism (layout.py)

    @property
    def copies(self) -> int:
        """Processes, or groups of them, that get another batch."""
        return self.processes // self.split

    def __str__(self) -> str:
        where = f", {self.offload} in the host's memory" if self.offload else ""
        return f"{self.strategy} on {self.processes} process{'es' if self.processes > 1 else ''}{where}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def launch_of(environ: Mapping[str, str]) -> Launch:
    """The launch that an environment describes. Raises LaunchError for what no recipe runs under."""
    processes = int(environ.get("WORLD_SIZE", "1"))
    if _flag(environ, "ACCELERATE_USE_MEGATRON_LM"):
        raise LaunchError("distributed_type: MEGATRON_LM is not supported; take a file of accelerate_configs/")
    if _flag(environ, "ACCELERATE_USE_DEEPSPEED"):
        file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if file != "none":
            raise LaunchError(
                f"deepspeed_config_file: {file}: write zero_stage and its neighbours into accelerate's own file, as "
                "accelerate_configs/zero2.yaml does: batch size, clipping and precision then come from the recipe"
            )
        kept = [
            what
            for what, key in (("optimizer", "OFFLOAD_OPTIMIZER_DEVICE"), ("parameters", "OFFLOAD_PARAM_DEVICE"))
            if environ.get(f"ACCELERATE_DEEPSPEED_{key}", "none") != "none"
        ]
        return Launch(processes, f"zero{environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}", "+".join(kept))
    if _flag(environ, "ACCELERATE_USE_FSDP"):
        if environ.get("FSDP_VERSION", "1") != "2":
            raise LaunchError("fsdp_version must be 2, as in accelerate_configs/fsdp2.yaml; version 1 is not supported")
        offload = "optimizer+parameters" if _flag(environ, "FSDP_OFFLOAD_PARAMS") else ""
        return Launch(processes, "fsdp2", offload)
    return Launch(processes, "ddp" if processes > 1 else "one")


def _flag(environ: Mapping[str, str], key: str) -> bool:
    return environ.get(key, "false").lower() in ("true", "1", "yes")


def check_launch(recipe: str, *, trains: bool, environ: Mapping[str, str] | None = None) -> Launch:
    """The launch of this process, refused where it cannot be what was meant. Imports no torch. Raises LaunchError."""
    environ = os.environ if environ is None else environ
    launch = launch_of(environ)
    if "WORLD_SIZE" not in environ:
        _check_alone(environ)
    if launch.processes > 1 and not trains:
        raise LaunchError(
            f"{recipe} works in one process, and {launch.processes} were launched, which would each do all of it; use "
            "accelerate_configs/single_gpu.yaml or cpu.yaml, or python alone"
        )
    if launch.strategy.startswith("zero"):
        from importlib.util import find_spec

        if find_spec("deepspeed") is None:
            raise LaunchError("distributed_type: DEEPSPEED needs DeepSpeed: pip install 'posttrain[deepspeed]'")
        if _flag(environ, "ACCELERATE_USE_CPU"):
            raise LaunchError("use_cpu: true would leave DeepSpeed out; set it to false, also on a machine without GPU")
    if launch.strategy == "fsdp2" and recipe == "ppo":
        raise LaunchError(
            "PPO's checkpoints do not gather what FSDP splits; use accelerate_configs/ddp.yaml, zero2.yaml, zero3.yaml"
        )
    return launch


def _check_alone(environ: Mapping[str, str]) -> None:
    """A process whose launcher gave it no rank is the only one. Raises LaunchError."""
    for key in (*_MPI_SIZES, "SLURM_STEP_NUM_TASKS"):
        if int(environ.get(key, "1")) > 1:
            raise LaunchError(
                f"{environ[key]} processes were started ({key}), and none was given a rank: each would train a copy; "
                "let `accelerate launch` start them, one launcher a machine"
            )
    # accelerate's launcher of one process sets these two for a configuration of several.
    if "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_PORT" in environ:
        raise LaunchError(
            "the configuration asks for several processes, and accelerate started one: distributed_type: MULTI_CPU, "
            "--cpu, or 'NO' with num_processes above 1. Use accelerate_configs/ddp.yaml, on a CPU too; if one process "
            "is meant, set num_processes: 1 and unset MASTER_PORT"
        )


def meet(facts: Mapping[str, Any], *, timeout_s: float) -> list[dict[str, Any]]:
    """Wait for every process that was launched, and compare what each is about to do; each one's facts, by rank.

    `facts` are values of JSON by name; those whose name begins with `_` are passed on and not compared. Raises
    LaunchError, on every process, when one does not come within `timeout_s` seconds (MEETING_S at most), or differs.
    """
    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    mine = {"_host": socket.gethostname(), **facts}
    if processes == 1:
        return [mine]
    limit_s = min(timeout_s, MEETING_S)
    try:
        store = _store()
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"rank {rank} of {processes} on {mine['_host']} met nobody at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} within {MEETING_S} s ({str(error).splitlines()[0]}): is the first "
            "machine's launcher running, is main_process_ip its address, is the port open, were all processes started?"
        ) from error
    store.set(f"here/{rank}", json.dumps(mine))
    missing = _wait(store, "here", processes, time.monotonic() + limit_s)
    if missing:
        raise LaunchError(
            f"{_ranks(missing)} did not come within {limit_s:g} s of rank {rank} on {mine['_host']}: ended early (then "
            "with a message of its own), never started, or still loading its data"
        )
    everyone: list[dict[str, Any]] = [json.loads(store.get(f"here/{other}")) for other in range(processes)]
    # Nobody leaves before all have read: the store may live in a process that is about to end. Then all of them have.
    with suppress(RuntimeError):
        store.set(f"read/{rank}", "")
        _wait(store, "read", processes, time.monotonic() + 5)
    differing = [line for name in facts if not name.startswith("_") for line in _difference(name, everyone)]
    if differing:
        raise LaunchError("the processes are about to do different things:\n" + "\n".join(differing))
    return everyone


def share_folder(folder: Path, *, timeout_s: float) -> None:
    """Each process sees `folder`, which the first one has made. Raises LaunchError on all of them otherwise."""
    end = time.monotonic() + FOLDER_S
    while not folder.is_dir() and time.monotonic() < end:
        time.sleep(0.2)
    everyone = meet({"_sees": folder.is_dir()}, timeout_s=timeout_s)
    absent = dict.fromkeys(facts["_host"] for facts in everyone if not facts["_sees"])
    if absent:
        raise LaunchError(
            f"output_dir: {folder} is not there on {', '.join(absent)}; all machines must share the file system that "
            "output_dir is on"
        )


@cache
def _rendezvous() -> Any:
    """The launch's store, kept: without torch's launcher, its server lives as long as this object on rank 0."""
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://", timeout=timedelta(seconds=MEETING_S)))[0]


def _store() -> Any:
    """A part of the store for one meeting, not of an earlier one of this process, nor of a group that was restarted."""
    from torch.distributed.distributed_c10d import PrefixStore

    meeting = f"posttrain/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_meetings)}"
    return PrefixStore(meeting, _rendezvous())


def _wait(store: Any, what: str, processes: int, end: float) -> list[int]:
    """The ranks that have not written `what` when the time is up."""
    missing = list(range(processes))
    while missing:
        missing = [rank for rank in missing if not store.check([f"{what}/{rank}"])]
        if not missing or time.monotonic() > end:
            break
        time.sleep(0.05)
    return missing


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _difference(name: str, everyone: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line on a fact that is not the same everywhere, with who has which value."""
    holders: dict[str, list[int]] = {}
    for rank, facts in enumerate(everyone):
        holders.setdefault(json.dumps(facts[name], sort_keys=True), []).append(rank)
    if len(holders) == 1:
        return []
    told = "; ".join(f"{value} on {_ranks(ranks)} ({everyone[ranks[0]]['_host']})" for value, ranks in holders.items())
    return [f"  {name}: {told}"]


def start_process_group(args_timeout_s: float, *, on_cpu: bool) -> None:
    """Begin torch.distributed on CPU processes with `ddp_timeout`, which transformers passes on for GPUs only."""
    import torch.distributed as dist

    if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=args_timeout_s))
        atexit.register(_leave_process_group)


def _leave_process_group() -> None:
    """gloo's threads end before the interpreter does, or now and then they abort a process that has done its work."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def check_state(args: Any, launch: Launch) -> None:
    """What accelerate has made of the launch, once the trainer's arguments exist. Raises LaunchError."""
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
            f"the processes talk by {found}, and must by {wanted} for tensors on {args.device.type}: leave ddp_backend "
            "out" + ("" if torch.cuda.is_available() else "; no GPU was found")
        )
    assert dist.get_world_size() == launch.processes


def backends() -> dict[str, str]:
    """Which backend carries the tensors of each kind of device."""
    import torch.distributed as dist

    pairs = (pair.partition(":") for pair in dist.get_backend_config().split(","))
    return {device: backend for device, _, backend in pairs}


def check_trainer(trainer: Any, launch: Launch) -> None:
    """What the trainer means to train with, once it is made. Raises LaunchError, or ConfigError."""
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
        raise LaunchError("fp16 was asked for, and a CPU has no loss scaling: it would train in fp32")


def watch_wrapper(trainer: Any, launch: Launch) -> Any:
    """A callback that looks at `trainer`'s model as it is about to train. Raises LaunchError before the first step."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            precision = "bf16" if args.bf16 else "fp16" if args.fp16 else ""
            split = bool(getattr(trainer, "is_distributed_loading_by_transformers", False))
            check_wrapped(trainer.model_wrapped, launch, precision=precision, splits_itself=split)

    return Watch()


def check_wrapped(model: Any, launch: Launch, *, precision: str = "", splits_itself: bool = False) -> None:
    """The model is wrapped as the strategy wants it, and computes in `precision`. Raises LaunchError.

    A trainer that splits its model over the processes itself wraps it in nothing (`splits_itself`).
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
            raise LaunchError(
                f"{launch} was launched, but {len(whole)} trained parameters are not shared out: {whole[0]}"
            )
    if precision and launch.strategy.startswith("zero"):
        on = {"bf16": model.bfloat16_enabled(), "fp16": model.fp16_enabled()}[precision]
        if not on:
            raise LaunchError(f"{precision} was asked for, but DeepSpeed computes in another format")


def check_deepspeed_bf16(trainer: Any, dtype: str) -> None:
    """bf16 under DeepSpeed rounds the weights themselves, so that fp32 weights are refused. Raises ConfigError."""
    if trainer.is_deepspeed_enabled and trainer.args.bf16 and dtype == "float32":
        raise ConfigError(
            "bf16: true under DeepSpeed rounds the weights themselves: set dtype: bfloat16, or bf16: false"
        )
