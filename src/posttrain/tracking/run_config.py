"""The configuration, lineage and environment that a dashboard shows of a run, and its final numbers."""

import importlib.metadata
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..fileio import lines_of
from ..log import world_size
from ..runs.lineage import git_commit, parent_record, versions
from ..runs.paths import ANSWERS
from .machine import describe_machine

SHOWN_ANSWERS = 64
_DASHBOARDS = ("trackio", "wandb")

# Entries of a stage's metrics that are not measurements: fixed rows for a successor, and ends of intervals.
_NO_MEASUREMENT = ("probe", "labels", "health", "_low", "_high")


def describe_run(stage: Any, performance: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A run's config, with the effective configuration at the top, so that runs can be compared by `learning_rate`."""
    parameters = stage.parameters and {"trained": stage.parameters[0], "all": stage.parameters[1]}
    return {
        **stage.config.to_dict(),
        "lineage": {
            "key": stage.key,
            "parents": {role: parent_record(stage.run_dir, path) for role, path in stage.inputs.items()},
            "data": stage.data,
            "git_commit": git_commit(),
        },
        "environment": {
            "versions": versions() | _installed(_DASHBOARDS),
            "machine": describe_machine(),
            "world_size": world_size(),
        },
        "parameters": parameters or {},
        "performance": dict(performance or {}),
    }


def _installed(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def final_numbers(metrics: Mapping[str, Any], logged: Collection[str], prefix: str = "final") -> dict[str, float]:
    """What a stage measured after training, as `final/after/greedy_exact`, without what was already `logged`."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if name in logged or name.startswith(_NO_MEASUREMENT) or name.endswith(_NO_MEASUREMENT):
            continue
        if isinstance(value, Mapping):
            found |= final_numbers(value, (), f"{prefix}/{name}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{prefix}/{name}"] = float(value)
    return found


def answers_of(run_dir: Path) -> list[dict[str, Any]]:
    """The first answers to the test rows after the stage; empty without test rows."""
    for name in ("after", "test", "validation"):
        path = run_dir / ANSWERS / f"{name}.jsonl"
        if path.is_file():
            lines = lines_of(path.read_text(encoding="utf-8"))[:SHOWN_ANSWERS]
            return [json.loads(line) for line in lines]
    return []
