"""The batch script of a stage: `job.sbatch.j2` filled in. Writes no file, so that a dry run can show the script."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..distributed import deepspeed_build
from ..errors import EXIT_STOPPED, EXIT_USER_ERROR
from .accelerate import recipe_path
from .settings import LaunchSettings
from .slurm import comment

KILL_S = 30  # this long before the time limit, a step that has not stopped is killed, and the job requeued


@dataclass(frozen=True)
class Job:
    """The data of one stage's script. Paths are absolute, since the script runs on other machines."""

    chain: str
    stage: str
    key: str  # the stage's (runs/key.py)
    recipe: str
    arguments: Sequence[str]
    launch: LaunchSettings
    run_dir: Path
    state: Path  # logs, and files by which the job and its ranks communicate
    script: Path
    cwd: Path

    @property
    def name(self) -> str:
        return f"{self.chain}/{self.stage}"

    @property
    def log(self) -> Path:
        return self.state / "job.log"


def render(job: Job) -> str:
    """The batch script of a stage, for `sbatch`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    slurm = job.launch.slurm
    assert slurm is not None
    templates = Environment(
        loader=PackageLoader("posttrain.launch", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    templates.filters["quote"] = shlex.quote
    quoted = {
        "script": job.script, "run_dir": job.run_dir, "state": job.state, "python": sys.executable,
        "bin": Path(sys.executable).parent, "config": job.launch.accelerate_config.resolve(),
        "recipe": recipe_path(job.recipe),
    }  # fmt: skip
    return templates.get_template("job.sbatch.j2").render(
        {name: shlex.quote(str(path)) for name, path in quoted.items()},
        chain=job.chain,
        stage=job.stage,
        slurm=slurm,
        options=options(job),
        arguments=_wrapped(job.arguments),
        deepspeed=job.launch.distributed_type == "DEEPSPEED" and slurm.nodes > 1,
        extensions=shlex.quote(str(deepspeed_build.FOLDER)) if deepspeed_build.FOLDER.is_dir() else None,
        grace_s=slurm.signal_s - KILL_S,
        exit_user_error=EXIT_USER_ERROR,
        exit_stopped=EXIT_STOPPED,
    )


def options(job: Job) -> list[str]:
    """The `#SBATCH` lines."""
    slurm = job.launch.slurm
    assert slurm is not None
    found = [
        f"--job-name={_option(job.name)}",
        f"--comment={_option(comment(job.key, job.run_dir))}",
        f"--nodes={slurm.nodes}",
        "--ntasks-per-node=1",
    ]
    asked = {
        "partition": slurm.partition, "account": slurm.account, "gpus-per-node": slurm.gpus_per_node or None,
        "cpus-per-task": slurm.cpus_per_task, "time": slurm.time, "constraint": slurm.constraint,
    }  # fmt: skip
    found += [f"--{option}={_option(value)}" for option, value in asked.items() if value is not None]
    found += [*slurm.extra, f"--chdir={_option(job.cwd)}", f"--output={_option(job.log)}"]
    return [*found, "--open-mode=append", "--requeue", f"--signal=B:USR1@{slurm.signal_s}"]


def _option(value: object) -> str:
    """Quote a value for an #SBATCH line: sbatch knows quotes there, but no other escapes."""
    text = str(value)
    return f'"{text}"' if any(c in text for c in " '|&()") else text


def _wrapped(arguments: Sequence[str]) -> str:
    """One option with its value per line."""
    lines: list[str] = []
    for word in arguments:
        if word.startswith("--") or not lines:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return f" \\{os.linesep}    ".join(lines)
