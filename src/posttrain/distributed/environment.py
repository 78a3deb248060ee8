"""The strategy that this process was launched with, checked before anything heavy is imported.

A launch must train as it was asked to, or be refused, as early as the difference can be known:

    check_launch     from the environment (here)
    meet             every process is here and is about to do the same, before weights are read (rendezvous.py)
    check_state      what accelerate has made of the launch, before weights are read (checks.py)
    check_wrapped    how the trainer has wrapped the model, before the first step (checks.py)

What accelerate 1.15 would silently do otherwise: a MULTI_CPU configuration starts one process, whatever its
num_processes; use_cpu disables DeepSpeed; processes without a launcher each train a copy; several GPUs in one process
become torch's DataParallel. These checks do not compare results; tests/distributed does.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..config.recipes import RECIPES
from ..errors import LaunchError

_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Launch:
    """What was asked for, as read from the environment that accelerate sets."""

    processes: int
    strategy: str  # one, ddp, zero0 to zero3, fsdp2
    offload: str = ""  # what is kept in the host's memory: "", optimizer, parameters, or optimizer+parameters
    split: int = 1  # processes per copy of the model, by tensor and pipeline parallelism (split/layout.py)

    @property
    def copies(self) -> int:
        """Copies of the model: processes, or groups of them, that get different batches."""
        return self.processes // self.split

    def __str__(self) -> str:
        where = f", {self.offload} in the host's memory" if self.offload else ""
        return f"{self.strategy} on {self.processes} process{'es' if self.processes > 1 else ''}{where}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def launch_of(environ: Mapping[str, str]) -> Launch:
    """The launch that an environment describes. Raises LaunchError for one that no recipe supports."""
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


def check_launch(recipe: str, *, environ: Mapping[str, str] | None = None) -> Launch:
    """The launch of this process. Raises LaunchError if it cannot be what was meant. Imports no torch."""
    environ = os.environ if environ is None else environ
    launch = launch_of(environ)
    if "WORLD_SIZE" not in environ:
        _check_alone(environ)
    if launch.processes > 1 and not RECIPES[recipe].several_processes:
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
    if launch.strategy in RECIPES[recipe].refuses:
        raise LaunchError(f"{recipe} under {launch.strategy}: {RECIPES[recipe].refuses[launch.strategy]}")
    return launch


def _check_alone(environ: Mapping[str, str]) -> None:
    """Raise LaunchError if a process without a rank is one of several, or was meant to be."""
    for key in (*_MPI_SIZES, "SLURM_STEP_NUM_TASKS"):
        if int(environ.get(key, "1")) > 1:
            raise LaunchError(
                f"{environ[key]} processes were started ({key}), and none was given a rank: each would train a copy; "
                "let `accelerate launch` start them, one launcher per machine"
            )
    # accelerate sets both when it starts a single process for a configuration of several.
    if "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_PORT" in environ:
        raise LaunchError(
            "the configuration asks for several processes, and accelerate started one: distributed_type: MULTI_CPU, "
            "--cpu, or 'NO' with num_processes above 1. Use accelerate_configs/ddp.yaml, on a CPU too; if one process "
            "is meant, set num_processes: 1 and unset MASTER_PORT"
        )
