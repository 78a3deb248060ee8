"""The launch settings of a chain: `launch:` for all its stages, `stages.NAME.launch:` for one.

    launch:
      accelerate_config: ddp.yaml
      slurm: {partition: gpu, account: lab, nodes: 2, gpus_per_node: 8, time: "12:00:00"}

A stage's values replace the chain's key by key (`environment` name by name). Everything is checked when the chain is
read, so that an error does not show only after a night in the queue. Imports no torch.
"""

import dataclasses
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from ..config.values import check_keys, check_value, read_yaml
from ..errors import ConfigError
from .accelerate import accelerate_config, check_config

KEYS = ("accelerate_config", "slurm")
_PROCESS_PER_GPU = {"MULTI_GPU", "DEEPSPEED", "FSDP"}  # types that torchrun starts on several nodes
_WORD = re.compile(r"[\w.,:@%+=&|()\[\]*/-]+")
_TIME = re.compile(r"\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2}")  # minutes | m:s | h:m:s | days-h[:m[:s]]
_SECRET = re.compile(r"key|token|secret|password|credential", re.IGNORECASE)

# Options of sbatch that the script sets itself -> the key that sets them; empty: no key does.
_OURS = {
    "nodes": "nodes", "N": "nodes", "gpus-per-node": "gpus_per_node", "G": "gpus_per_node", "gpus": "gpus_per_node",
    "gres": "gpus_per_node", "cpus-per-task": "cpus_per_task", "c": "cpus_per_task", "time": "time", "t": "time",
    "partition": "partition", "p": "partition", "account": "account", "A": "account", "constraint": "constraint",
    "C": "constraint", "signal": "signal_s",
} | dict.fromkeys(
    ("ntasks", "n", "ntasks-per-node", "job-name", "J", "output", "o", "error", "e", "open-mode", "requeue",
     "no-requeue", "dependency", "d", "chdir", "D", "parsable", "kill-on-invalid-dep", "comment", "wrap", "array", "a",
     "export"),
    "",
)  # fmt: skip


@dataclass(frozen=True)
class SlurmSettings:
    """Group `launch.slurm`: the resources of a stage, and how its job is run and requeued."""

    partition: str | None = None
    account: str | None = None
    nodes: int = field(default=1, metadata={"min": 1})
    gpus_per_node: int = field(default=0, metadata={"min": 0})  # one process per GPU; with 0, one process per node
    cpus_per_task: int | None = field(default=None, metadata={"min": 1})  # per node: all its processes share them
    time: str | None = None  # in sbatch's formats: "30", "12:00:00", "2-00"
    constraint: str | None = None
    modules: list[str] = field(default_factory=list)  # `module load`, in this order
    environment: dict[str, Any] = field(default_factory=dict)  # exported; put secrets into your shell instead
    container: str | None = None  # a command in front of the step's, e.g. `apptainer exec --nv image.sif`
    extra: list[str] = field(default_factory=list)  # more `#SBATCH` lines: ["--qos=high", "--exclusive"]
    signal_s: int = field(
        default=300, metadata={"min": 60}
    )  # before the time limit; enough for a training step and a checkpoint
    max_failures: int = field(default=3, metadata={"min": 0})  # requeues after a failure; preemptions do not count
    preflight_s: int = field(default=300, metadata={"min": 1})  # how long nodes wait for each other at the start

    @property
    def processes_per_node(self) -> int:
        return max(1, self.gpus_per_node)

    @property
    def processes(self) -> int:
        return self.nodes * self.processes_per_node


@dataclass(frozen=True)
class LaunchSettings:
    """How one stage is launched."""

    accelerate_config: Path
    slurm: SlurmSettings | None = None
    named: bool = True  # False: no config was chosen; one process, on a GPU if there is one

    @property
    def distributed_type(self) -> str:
        return str(read_yaml(self.accelerate_config).get("distributed_type", "NO"))


def read_launch(document: Any, where: str, *, beside: Path, default: LaunchSettings | None = None) -> LaunchSettings:
    """Check a `launch` mapping; `default` has the missing keys. Raises ConfigError, or LaunchError for a config."""
    raw = document or {}
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where} must be a mapping, got {raw!r}")
    check_keys(raw, KEYS, where)
    slurm = default.slurm if default else None
    if raw.get("slurm") is not None:
        slurm = _read_slurm(raw["slurm"], f"{where}.slurm", slurm or SlurmSettings())
    name = raw.get("accelerate_config")
    if name is not None:
        config = accelerate_config(str(name), beside)
        check_config(config)
        return LaunchSettings(config, slurm)
    if default is not None and default.named:
        return LaunchSettings(default.accelerate_config, slurm)
    if slurm is not None:  # the nodes' GPUs count, not this machine's
        name = "single_gpu.yaml" if slurm.gpus_per_node else "cpu.yaml"
    return LaunchSettings(accelerate_config(name, beside), slurm, named=False)


def _read_slurm(raw: Any, where: str, default: SlurmSettings) -> SlurmSettings:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where} must be a mapping, got {raw!r}")
    fields = {f.name: f for f in dataclasses.fields(SlurmSettings)}
    check_keys(raw, fields, where)
    if raw.get("time") is not None and not isinstance(raw["time"], str):
        raise ConfigError(
            f'{where}: time must be text in quotes, such as "12:00:00" or "90" (minutes), got {raw["time"]!r}: '
            "without quotes YAML reads 12:00:00 as the number 43200"
        )
    types = get_type_hints(SlurmSettings)
    values = {k: check_value(k, v, types[k], fields[k].metadata, where) for k, v in raw.items()}
    if "environment" in values:
        values["environment"] = {**default.environment, **_environment(values["environment"], where)}
    settings = dataclasses.replace(default, **values)
    for key in ("partition", "account", "constraint"):
        _word(getattr(settings, key), key, where)
    for module in settings.modules:
        _word(module, "modules", where)
    if settings.time is not None and not _TIME.fullmatch(settings.time):
        raise ConfigError(f'{where}: time must be minutes, "hh:mm:ss" or "days-hh:mm:ss", got {settings.time!r}')
    _check_extra(settings.extra, where)
    if settings.container is not None:
        _check_container(settings.container, where)
    return settings


def _word(value: str | None, key: str, where: str) -> None:
    if value is not None and not _WORD.fullmatch(value):
        raise ConfigError(f"{where}: {key} must be one word without blanks or quotes, got {value!r}")


def _environment(raw: Mapping[str, Any], where: str) -> dict[str, str]:
    found = {}
    for name, value in raw.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", str(name)):
            raise ConfigError(f"{where}: environment: {name!r} is not a name of a variable")
        if _SECRET.search(name):
            raise ConfigError(
                f"{where}: environment: {name} looks like a secret, and others can read the scripts; export it in "
                "the shell that runs `posttrain submit`: sbatch passes that environment on"
            )
        if isinstance(value, bool) or not isinstance(value, (str, int, float)) or "\n" in str(value):
            raise ConfigError(f"{where}: environment: {name} must be text of one line or a number, got {value!r}")
        found[str(name)] = str(value)
    return found


def _check_extra(lines: list[str], where: str) -> None:
    for line in lines:
        option = re.fullmatch(r"(--[\w-]+|-[A-Za-z])([= ].*|\w*)?", line)
        if option is None or "\n" in line:
            raise ConfigError(
                f'{where}: extra: each item must be one option of sbatch, such as "--qos=high", got {line!r}'
            )
        name = option[1].lstrip("-")
        if name in _OURS:
            use = f"use {_OURS[name]}" if _OURS[name] else "the script needs its own value"
            raise ConfigError(f"{where}: extra: {option[1]} is set by posttrain; {use}")


def _check_container(command: str, where: str) -> None:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"{where}: container is not a command ({error}): {command!r}") from error
    if not words or "\n" in command:
        raise ConfigError(f"{where}: container must be a command on one line, got {command!r}")


def check_fit(launch: LaunchSettings, where: str) -> None:
    """Check that the accelerate config starts the processes that Slurm is asked for. Raises ConfigError."""
    slurm, kind = launch.slurm, launch.distributed_type
    if slurm is None:
        raise ConfigError(f"{where}.slurm is missing: set at least `slurm: {{nodes: 1}}`; docs/slurm.md lists its keys")
    if slurm.processes > 1 and kind not in _PROCESS_PER_GPU:
        raise ConfigError(
            f"{where}: {slurm.nodes} nodes with {slurm.processes_per_node} processes each need an accelerate_config "
            f"with distributed_type MULTI_GPU, DEEPSPEED or FSDP; {launch.accelerate_config} has {kind}"
        )
