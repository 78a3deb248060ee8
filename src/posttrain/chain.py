"""The stage graph: what is complete, what must run and why, and the running of it.

    name: smollm2-spelling
    stages:
      sft:    {recipe: sft,    config: sft.yaml}
      reward: {recipe: reward, config: reward.yaml, inputs: {policy: sft}}
    launch: {accelerate_config: ddp.yaml}      without it: one process, on the GPU where there is one
    output_dir: runs/smollm2-spelling

`inputs` is the only statement of order. A stage whose key (identity.py) is complete is skipped; one that was cut off
is resumed; one whose key changed is moved to `.previous/` and run anew, with all that depends on it. Imports no torch.
"""

import dataclasses
import difflib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .artifacts import Lineage, is_complete, read_lineage, verify, write_atomically
from .closing import closing_table, result_line
from .config import StageConfig, build, read_yaml
from .errors import EXIT_USER_ERROR, ArtifactError, ConfigError, LaunchError
from .identity import stage_key
from .launch import IN_CHAIN, build_command, die_with_parent, environment
from .launch.settings import LaunchSettings, read_launch
from .logs import LAUNCHED, last_launch
from .methods import check_takeover
from .redact import redact_values
from .run_dir import lock
from .settings import RECIPES
from .terminal import Lines

_KEYS = {"name", "stages", "launch", "output_dir"}
_STAGE_KEYS = {"recipe", "config", "inputs", "overrides", "launch"}
_OWNER = "chain.json"


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
    """A chain, its stages in an order in which they can run."""

    name: str
    path: Path
    output_dir: Path
    stages: tuple[ChainStage, ...]
    launch_config: Path  # of stages that do not say their own

    def run_dir(self, stage: str) -> Path:
        return self.output_dir / stage


@dataclass
class Plan:
    """What will happen to one stage, and why."""

    stage: ChainStage
    action: str  # skip | run | resume
    reason: str
    key: str
    stale: bool = field(default=False)  # a result with another key stands in the way


def read_chain(path: Path) -> Chain:
    """Read and check a chain and every stage's configuration. Raises ConfigError; imports nothing heavy."""
    document = read_yaml(path)
    _known(document, _KEYS, str(path))
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
    _known(raw, _STAGE_KEYS, where)
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
    """Each policy can be taken over as its stage means to: found out before the first stage has run."""
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


def _known(mapping: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in mapping:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")


def _in_order(stages: Sequence[ChainStage], path: Path) -> list[ChainStage]:
    """Parents before children, otherwise as written. Raises ConfigError on a cycle."""
    ordered: list[ChainStage] = []
    waiting = list(stages)
    while waiting:
        done = {s.name for s in ordered}
        ready = [s for s in waiting if set(s.parents.values()) <= done]
        if not ready:
            raise ConfigError(f"{path}: stages {', '.join(s.name for s in waiting)} depend on each other in a circle")
        ordered.append(ready[0])
        waiting.remove(ready[0])
    return ordered


def plan(chain: Chain, only: str | None = None) -> list[Plan]:
    """What would run, and why. Raises ArtifactError when a finished stage was altered."""
    names = [s.name for s in chain.stages]
    if only is not None and only not in names:
        raise ConfigError(f"--only {only}: no such stage; {chain.path} has {', '.join(names)}")
    keys: dict[str, str] = {}
    plans: list[Plan] = []
    for stage in chain.stages:
        key = stage_key(stage.config, {role: keys[parent] for role, parent in stage.parents.items()})
        keys[stage.name] = key
        plans.append(_plan_stage(chain, stage, key, {p.stage.name: p for p in plans}))
    if only is None:
        return plans
    chosen = next(p for p in plans if p.stage.name == only)
    missing = [
        parent for parent in chosen.stage.parents.values()
        if next(p for p in plans if p.stage.name == parent).action != "skip"
    ]  # fmt: skip
    if missing:
        raise ArtifactError(f"--only {only}: its input {missing[0]} is not complete; run the chain without --only")
    return [chosen]


def _plan_stage(chain: Chain, stage: ChainStage, key: str, earlier: Mapping[str, Plan]) -> Plan:
    run_dir = chain.run_dir(stage.name)
    redone = [parent for parent in stage.parents.values() if earlier[parent].action != "skip"]
    if is_complete(run_dir):
        lineage = read_lineage(run_dir)
        if lineage.key == key and not redone:
            verify(run_dir)
            return Plan(stage, "skip", "complete", key)
        if redone:
            return Plan(stage, "run", f"its input {redone[0]} runs again", key, stale=True)
        return Plan(stage, "run", "; ".join(_changes(lineage, stage, key)), key, stale=True)
    marker = run_dir / "stage.json"
    if marker.is_file():
        if json.loads(marker.read_text(encoding="utf-8")).get("key") == key:
            return Plan(stage, "resume", "was cut off", key)
        return Plan(stage, "run", "an unfinished run with another configuration is there", key, stale=True)
    return Plan(stage, "run", "not there yet", key)


def _changes(lineage: Lineage, stage: ChainStage, key: str) -> list[str]:
    """In words, why a finished stage's key is not today's."""
    then, now = _flatten(lineage.config), _flatten(redact_values(stage.config.to_dict()))
    changed = [
        f"{k}: {then.get(k)!r} -> {now.get(k)!r}"
        for k in now
        if then.get(k) != now.get(k) and not k.startswith("inputs")
    ]
    return changed[:4] or ["its data, its base or a library's version changed"]


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def run(chain: Chain, *, only: str | None = None, dry_run: bool = False, view: Lines | None = None) -> None:
    """Run what is not complete, in order, and print the closing table. Raises a PosttrainError at the first failure.

    `view` shows it while it runs; plain lines when it is left out.
    """
    take_chain_directory(chain, write=not dry_run)
    plans = plan(chain, only)
    with Lines() if view is None or dry_run else view as shown:
        for p in plans:
            result = result_line(chain.run_dir(p.stage.name)) if p.action == "skip" else ""
            shown.planned(p.stage.name, p.action, p.reason, chain.run_dir(p.stage.name), result)
        if dry_run:
            return
        for number, p in enumerate(plans, 1):
            if p.action == "skip":
                continue
            if p.stale:
                move_aside(chain, p.stage.name)
            _run_stage(chain, p.stage, f"[{number}/{len(plans)} {p.stage.name}]", shown)
        width = shown.width
    print(closing_table(chain, width), flush=True)
    print(f"as a page: posttrain report {chain.path}", flush=True)


def take_chain_directory(chain: Chain, *, write: bool = True) -> None:
    """Refuse an output directory that another chain owns. Raises ArtifactError."""
    owner = chain.output_dir / _OWNER
    mine = {"name": chain.name, "file": str(chain.path.resolve())}
    if owner.is_file():
        theirs = json.loads(owner.read_text(encoding="utf-8"))
        if theirs.get("name") != chain.name:
            raise ArtifactError(
                f"output_dir: {chain.output_dir} belongs to the chain {theirs.get('name')!r} ({theirs.get('file')}); "
                f"set output_dir in {chain.path} to another folder"
            )
    elif chain.output_dir.is_dir() and any(chain.output_dir.iterdir()):
        raise ArtifactError(f"output_dir: {chain.output_dir} is not empty and no chain's; choose another folder")
    if write:
        chain.output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(owner, json.dumps(mine) + "\n")


def move_aside(chain: Chain, name: str) -> None:
    """Keep an outdated result under .previous/: nothing that was paid for is deleted.

    Raises LaunchError when a process is training there.
    """
    run_dir = chain.run_dir(name)
    lock(run_dir).close()
    target = chain.output_dir / ".previous" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    target.parent.mkdir(exist_ok=True)
    shutil.move(str(run_dir), str(target))
    print(f"kept the previous {name} as {target}", flush=True)


def stage_arguments(chain: Chain, stage: ChainStage) -> list[str]:
    """A stage's command line: its file, the chain's overrides, its directory, its inputs."""
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


def _run_stage(chain: Chain, stage: ChainStage, label: str, view: Lines) -> None:
    """Launch one stage; show its lines, keep them and its stderr, and end with its error when it fails."""
    command = build_command(stage.config.recipe, stage_arguments(chain, stage), stage.launch.accelerate_config)
    logs = chain.output_dir / ".logs"
    logs.mkdir(exist_ok=True)
    log = logs / f"{stage.name}.stderr"
    view.started(stage.name, label, f"accelerate launch {' '.join(command[3:])}", log)
    with log.open("a", encoding="utf-8") as stderr, (logs / f"{stage.name}.stdout").open("a", encoding="utf-8") as kept:
        stderr.write(f"{LAUNCHED}{time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        stderr.flush()
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment(stage.launch.accelerate_config) | {IN_CHAIN: str(os.getpid())},
            preexec_fn=die_with_parent,
        )
        assert process.stdout is not None
        for line in process.stdout:
            kept.write(line)
            kept.flush()
            view.line(stage.name, label, line)
        code = process.wait()
    view.ended(stage.name, result_line(chain.run_dir(stage.name)) if code == 0 else None)
    if code == 0:
        return
    tail = last_launch(log.read_text(encoding="utf-8", errors="replace").splitlines())
    named = [line for line in tail if line.split(":")[0].endswith("Error") and not line.startswith(_LAUNCHERS_OWN)]
    last = len(tail) - 1 - tail[::-1].index(named[-1]) if named else 0
    shown = "\n".join(tail[last:][:25]) if named else "\n".join(tail[-15:])
    if code == EXIT_USER_ERROR or (named and named[-1].split(":")[0] in _OUR_ERRORS):
        raise LaunchError(f"stage {stage.name} stopped:\n{_without_launcher(shown)}")
    print(shown, file=sys.stderr)
    raise LaunchError(
        f"stage {stage.name} ended with exit code {code}; its errors are in {log}. "
        "Finished stages and checkpoints are kept: run the same command again to go on."
    )


_LAUNCHERS_OWN = "subprocess.CalledProcessError"
_OUR_ERRORS = {"ConfigError", "DataError", "ArtifactError", "LaunchError", "GateError", "UnreachableError"}


def _without_launcher(text: str) -> str:
    """Drop the traceback that accelerate's launcher adds below a recipe's own message."""
    return text.split("\nTraceback (most recent call last)")[0]
