"""What would happen to each stage of a chain, and why: skip, run or resume. Imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..config.stage_config import changed_keys
from ..errors import ArtifactError, ConfigError
from ..runs.key import KEYED_VERSIONS, stage_key
from ..runs.lineage import Lineage, is_complete, read_lineage, verify, versions
from ..runs.paths import MARKER
from .graph import Chain, ChainStage


@dataclass
class Plan:
    """What will happen to one stage, and why."""

    stage: ChainStage
    action: str  # skip | run | resume
    reason: str
    key: str
    stale: bool = field(default=False)  # a result with another key stands in the way


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
        return Plan(stage, "run", _changes(lineage, stage), key, stale=True)
    marker = run_dir / MARKER
    if marker.is_file():
        if json.loads(marker.read_text(encoding="utf-8")).get("key") == key:
            return Plan(stage, "resume", "was cut off", key)
        return Plan(stage, "run", "an unfinished run with another configuration is there", key, stale=True)
    return Plan(stage, "run", "not there yet", key)


def _changes(lineage: Lineage, stage: ChainStage) -> str:
    """In words, why the key of a finished stage is not today's: configuration, versions, else data or base."""
    changed = [f"{key}: {then!r} -> {now!r}" for key, (then, now) in changed_keys(lineage.config, stage.config).items()]
    installed = versions()
    changed += [
        f"{name} {lineage.versions.get(name)} -> {installed[name]}"
        for name in KEYED_VERSIONS
        if lineage.versions.get(name) != installed[name]
    ]
    return "; ".join(changed[:4]) or "the content of its data or of its base changed"
