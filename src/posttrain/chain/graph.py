"""The graph of stages, read from chain.yaml and checked.

    name: smollm2-spelling
    stages:
      sft:    {recipe: sft,    config: sft.yaml}
      reward: {recipe: reward, config: reward.yaml, inputs: {policy: sft}}
    launch: {accelerate_config: ddp.yaml}      without it: one process, on the GPU if there is one
    output_dir: runs/smollm2-spelling

`inputs` alone defines the order. A stage that is complete with the same key (`runs/key.py`) is skipped, an interrupted
one is resumed. One whose key changed is moved to `.previous/` and run again, with all stages that depend on it. Imports
no torch.
"""

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.peft_methods import check_takeover
from ..config.recipes import RECIPES
from ..config.stage_config import StageConfig, build
from ..config.values import check_keys, read_yaml
from ..errors import ConfigError
from ..launch.settings import LaunchSettings, read_launch

_KEYS = {"name", "stages", "launch", "output_dir"}
_STAGE_KEYS = {"recipe", "config", "inputs", "overrides", "launch"}


@dataclass(frozen=True)
class ChainStage:
    """One stage: its checked configuration, its file, and its parents by role."""

    name: str
    config: StageConfig
    config_file: Path
    overrides: Mapping[str, Any]
    parents: Mapping[str, str]  # role -> stage name
    launch: LaunchSettings


@dataclass(frozen=True)
class Chain:
    """A chain; its stages are in an order in which they can run."""

    name: str
    path: Path
    output_dir: Path
    stages: tuple[ChainStage, ...]
    launch_config: Path  # for stages without their own

    def run_dir(self, stage: str) -> Path:
        return self.output_dir / stage


def read_chain(path: Path) -> Chain:
    """Read and check a chain and every stage's configuration. Raises ConfigError; imports nothing heavy."""
    document = read_yaml(path)
    check_keys(document, _KEYS, str(path))
    name = document.get("name")
    if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
        raise ConfigError(f"{path}: name must be a word without '/', got {name!r}")
    raw = document.get("stages")
    if not isinstance(raw, dict) or not raw:
        raise ConfigError(f"{path}: stages must be a mapping of at least one stage, got {raw!r}")
    launch = read_launch(document.get("launch"), f"{path}: launch", beside=path.parent)
    output_dir = Path(os.path.expanduser(str(document.get("output_dir") or f"runs/{name}")))
    stages = [_read_stage(path, output_dir, n, raw[n], set(raw), launch) for n in raw]
    _check_takeovers(path, {stage.name: stage for stage in stages})
    return Chain(name, path, output_dir, tuple(_in_order(stages, path)), launch.accelerate_config)


def _read_stage(
    path: Path, output_dir: Path, name: str, raw: Any, names: set[str], launch: LaunchSettings
) -> ChainStage:
    where = f"{path}: stages.{name}"
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: expected {{recipe, config, inputs}}, got {raw!r}")
    check_keys(raw, _STAGE_KEYS, where)
    recipe = raw.get("recipe")
    if recipe not in RECIPES:
        raise ConfigError(f"{where}: unknown recipe {recipe!r}; known: {', '.join(RECIPES)}")
    if not isinstance(raw.get("config"), str):
        raise ConfigError(f"{where}: config must name a file, got {raw.get('config')!r}")
    parents = raw.get("inputs") or {}
    for role, parent in parents.items():
        if role not in RECIPES[recipe].inputs:
            raise ConfigError(f"{where}: {recipe} has no input {role!r}; it has {', '.join(RECIPES[recipe].inputs)}")
        if parent not in names:
            near = difflib.get_close_matches(str(parent), names, n=1)
            raise ConfigError(
                f"{where}: inputs.{role} names no stage: {parent!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
    file = path.parent / raw["config"]
    overrides = dict(raw.get("overrides") or {})
    inputs = {role: str(output_dir / parent) for role, parent in parents.items()}
    config = build(
        recipe,
        read_yaml(file),
        {**overrides, "output_dir": str(output_dir / name), "inputs": inputs},
        source=str(file),
    )
    own = read_launch(raw.get("launch"), f"{where}.launch", beside=path.parent, default=launch)
    return ChainStage(name, config, file, overrides, parents, own)


def _check_takeovers(path: Path, stages: Mapping[str, ChainStage]) -> None:
    """Check how each stage starts from its policy, before the first stage runs. Raises ConfigError."""
    for stage in stages.values():
        parent = stages.get(stage.parents.get("policy", ""))
        if parent is not None and {"adapter"} <= parent.config.groups.keys() & stage.config.groups.keys():
            made_with = dataclasses.asdict(parent.config.adapter)
            merged = parent.config.adapter.start == "merge" and "policy" in parent.parents
            if merged and stage.config.adapter.start == "continue" and parent.config.adapter.method != "none":
                raise ConfigError(
                    f"{path}: stages.{stage.name}: adapter.start: continue cannot follow {parent.name}, which "
                    "merges its own input; use adapter.start: merge"
                )
            check_takeover(f"{path}: stages.{stage.name}: its input {parent.name}", made_with, stage.config.adapter)


def _in_order(stages: Sequence[ChainStage], path: Path) -> list[ChainStage]:
    """Sort parents before children, otherwise as written. Raises ConfigError for a cycle."""
    ordered: list[ChainStage] = []
    waiting = list(stages)
    while waiting:
        done = {s.name for s in ordered}
        ready = [s for s in waiting if set(s.parents.values()) <= done]
        if not ready:
            raise ConfigError(f"{path}: stages {', '.join(s.name for s in waiting)} depend on each other in a cycle")
        ordered.append(ready[0])
        waiting.remove(ready[0])
    return ordered


def stage_arguments(chain: Chain, stage: ChainStage) -> list[str]:
    """A stage's command-line arguments: its file, the chain's overrides, its directory, its inputs."""
    arguments = ["--config", str(stage.config_file)]
    for key, value in stage.overrides.items():
        if isinstance(value, Mapping):
            for sub, v in value.items():
                arguments += [f"--{key}.{sub}", _shell(v)]
        else:
            arguments += [f"--{key}", _shell(value)]
    arguments += ["--output_dir", str(chain.run_dir(stage.name))]
    for role, parent in stage.parents.items():
        arguments += [f"--inputs.{role}", str(chain.run_dir(parent))]
    return arguments


def _shell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
