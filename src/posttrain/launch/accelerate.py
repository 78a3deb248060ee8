"""The only builder of `accelerate launch`: command, configuration file, and environment."""

import ctypes
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config.values import read_yaml
from ..distributed import deepspeed_build
from ..distributed.rendezvous import MEETING_S
from ..errors import LaunchError

ROOT = Path(__file__).resolve().parents[3]  # the checkout: recipes/ and accelerate_configs/ are beside src/
PR_SET_PDEATHSIG = 1  # prctl(2)
IN_CHAIN = "POSTTRAIN_IN_CHAIN"  # set for a process that a chain has launched: the chain's process id


def recipe_path(recipe: str) -> Path:
    """The script of a recipe. Raises LaunchError outside a checkout."""
    path = ROOT / "recipes" / f"{recipe}.py"
    if not path.is_file():
        raise LaunchError(f"{path} does not exist: posttrain runs from its checkout (pip install -e .)")
    return path


def accelerate_config(name: str | None, beside: Path) -> Path:
    """Find a config by path (relative to the chain's file), or by name in accelerate_configs/. Raises LaunchError.

    None means one process, on the GPU if there is one.
    """
    if name is None:
        name = "single_gpu.yaml" if shutil.which("nvidia-smi") else "cpu.yaml"
    for candidate in (beside / name, Path(name), ROOT / "accelerate_configs" / name):
        if candidate.is_file():
            return candidate
    raise LaunchError(f"launch.accelerate_config: {name} does not exist; in accelerate_configs/: {known_configs()}")


def known_configs() -> str:
    return ", ".join(sorted(p.name for p in (ROOT / "accelerate_configs").glob("*.yaml")))


def check_config(file: Path) -> None:
    """Refuse a configuration for which accelerate starts fewer than num_processes. Raises LaunchError."""
    config = read_yaml(file)
    kind, processes = str(config.get("distributed_type", "NO")), int(config.get("num_processes") or 1)
    alone = kind in ("NO", "False", "MULTI_CPU")
    if kind == "MULTI_CPU" or (alone and processes > 1):
        raise LaunchError(
            f"{file}: accelerate starts one process for distributed_type: {kind}, and num_processes is {processes}; "
            f"use MULTI_GPU, on CPUs too, as ddp.yaml does. In accelerate_configs/: {known_configs()}"
        )


def build_command(recipe: str, arguments: Sequence[str], config_file: Path) -> list[str]:
    """`accelerate launch --config_file F recipes/R.py ARGUMENTS`."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config_file)]
    if int(read_yaml(config_file).get("num_machines") or 1) > 1:
        launcher += ["--rdzv_conf", f"timeout={MEETING_S}"]  # torch would wait ten minutes for an absent machine
    return [*launcher, str(recipe_path(recipe)), *arguments]


def environment(config_file: Path) -> dict[str, str]:
    """The environment of a launched stage.

    accelerate sets OMP_NUM_THREADS=1, so that one process would use one core of many; here it is cores / processes of
    the machine. DeepSpeed is told where `make setup` compiled its parts, and finds this environment's ninja. A value
    that the user has set is kept.
    """
    config = read_yaml(config_file)
    here = int(config.get("num_processes") or 1) // int(config.get("num_machines") or 1)
    threads = max(1, len(os.sched_getaffinity(0)) // max(1, here))
    defaults = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    if deepspeed_build.FOLDER.is_dir():
        defaults["TORCH_EXTENSIONS_DIR"] = str(deepspeed_build.FOLDER)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**defaults, **os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"}


def accelerate_environment(config_file: Path) -> dict[str, str]:
    """The variables that accelerate sets in each process of a launch with this configuration, without the ranks.

    For a process that runs several launches one after the other: a benchmark, a group of tests.
    """
    from ..upstream.accelerate import launch_environment

    return launch_environment(config_file)


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, so that a killed chain leaves no stage running.

    Does nothing on other systems, where the run directory's lock still keeps two stages apart.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def die_with_chain() -> None:
    """The same for a recipe that a chain has launched. Raises LaunchError if the chain has ended already."""
    if sys.platform == "linux" and IN_CHAIN in os.environ:
        die_with_parent()
        if not Path(f"/proc/{os.environ[IN_CHAIN]}").exists():
            raise LaunchError("the chain that launched this stage has ended")
