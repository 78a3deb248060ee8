"""What a chain's directories say, as plain data. Nothing is computed again, and nothing that is missing is made up.

    chain.yaml, configs     what was asked for
    lineage.json            what a complete stage made, from what, and how good it is
    gates.json, stage.json  what a stage that is not complete got to
    metrics.jsonl           curves
    completions.jsonl       scores and KL of single completions
    answers/                the test rows

Imports no torch.
"""

import fcntl
import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..chain.graph import Chain, ChainStage, stage_arguments
from ..chain.run import state_folder
from ..config.recipes import RECIPES
from ..config.stage_config import changed_keys
from ..errors import ArtifactError
from ..intervals import Share
from ..launch import build_command
from ..launch.exit_files import read_reports
from ..redact import redact, redact_values
from ..runs.headline import Measure, headline
from ..runs.lineage import Lineage, is_complete, read_lineage, resolve_parent
from ..runs.paths import COMPLETIONS, GATES, LOCK, LOGS, MARKER, METRICS
from .answers import SideBySide, read_side_by_side
from .curves import Log, read_log, sample_lines
from .entities import Entities, read_entities
from .health import read_alerts, read_findings

# A state, with a sign that is read without colour.
GLYPHS = {
    "complete": "✓ complete", "running": "▶ running", "cut off": "✂ cut off", "gate failed": "✗ gate failed",
    "not started": "○ not started", "damaged": "✗ damaged",
}  # fmt: skip


@dataclass(frozen=True)
class Parent:
    """One input of a stage, as it was recorded; `same` says whether that stage's result still is the one it was."""

    role: str
    stage: str
    key: str
    digest: str
    same: bool


@dataclass(frozen=True)
class Note:
    """One thing a reader should know of a stage's health."""

    step: int | None
    text: str
    advice: str = ""


@dataclass
class StageFacts:
    """One stage, complete or not."""

    name: str
    recipe: str
    run_dir: Path
    state: str  # complete | running | cut off | gate failed | not started | damaged
    why: str  # of a state that is not complete, in words
    roles: Mapping[str, str]  # role -> stage, as the chain's file has it
    command: str
    config_text: str
    changed: list[str]  # where the chain's files differ from what a complete stage was made with
    lineage: Lineage | None = None
    parents: list[Parent] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=list)
    numbers: dict[str, str] = field(default_factory=dict)  # what was measured beside shares, in words
    log: Log = field(default_factory=Log)
    completions: list[dict[str, Any]] = field(default_factory=list)
    completions_all: bool = True
    gates: list[dict[str, Any]] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    entities: Entities | None = None

    @property
    def complete(self) -> bool:
        return self.state == "complete"


@dataclass(frozen=True)
class ChainFacts:
    """All that a report says."""

    name: str
    path: Path
    output_dir: Path
    made_at: str
    chain_text: str
    launch_text: str
    stages: tuple[StageFacts, ...]
    answers: SideBySide | None
    missing: tuple[str, ...]

    @property
    def commits(self) -> list[str]:
        return sorted({s.lineage.git_commit for s in self.stages if s.lineage and s.lineage.git_commit})

    @property
    def versions(self) -> dict[str, str]:
        """Library -> version; of several, all."""
        found: dict[str, list[str]] = {}
        for stage in self.stages:
            for name, version in (stage.lineage.versions if stage.lineage else {}).items():
                if version not in found.setdefault(name, []):
                    found[name].append(version)
        return {name: ", ".join(several) for name, several in found.items()}


def read_facts(chain: Chain) -> ChainFacts:
    """Read a chain's directories, whatever state they are in. Raises ArtifactError only for damaged answers."""
    stages = [read_stage(chain, stage) for stage in chain.stages]
    asked = [
        (s.name, s.run_dir, not any(role == "policy" for role in s.roles))
        for s in stages
        if s.complete and RECIPES[s.recipe].answers_prompts
    ]
    answers = read_side_by_side(asked)
    missing = [f"{s.name}: {s.state}; {s.why}" for s in stages if not s.complete]
    if answers is None and any(s.complete and RECIPES[s.recipe].makes == "policy" for s in stages):
        missing.append("answers side by side: no stage has a test_file, so nothing was asked")
    return ChainFacts(
        chain.name, chain.path, chain.output_dir, time.strftime("%Y-%m-%d %H:%M %Z"),
        _text(chain.path), _text(chain.launch_config), tuple(stages), answers, tuple(missing),
    )  # fmt: skip


def read_stage(chain: Chain, stage: ChainStage) -> StageFacts:
    """One stage's directory."""
    run_dir, recipe = chain.run_dir(stage.name), stage.config.recipe
    command = build_command(recipe, stage_arguments(chain, stage), stage.launch.accelerate_config)
    facts = StageFacts(
        stage.name, recipe, run_dir, "", "", stage.parents,
        redact(f"accelerate launch {shlex.join(_relative(word) for word in command[3:])}"),
        _text(stage.config_file), [],
    )  # fmt: skip
    stderr = chain.output_dir / LOGS / f"{stage.name}.stderr"
    facts.log = read_log(run_dir / METRICS, lambda key: _is_drawn(recipe, key))
    facts.completions, facts.completions_all = sample_lines(run_dir / COMPLETIONS)
    facts.gates = _read_gates(run_dir)
    facts.state, facts.why = _state(facts, state_folder(chain, stage.name))
    if is_complete(run_dir):
        try:
            facts.lineage = read_lineage(run_dir)
            _read_results(facts, facts.lineage)
            facts.changed = _changes(facts.lineage, stage)
            facts.notes = _findings(facts, stderr)
        except (ArtifactError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            facts.state, facts.why, facts.lineage = "damaged", redact(f"lineage.json: {error}"), None
            facts.measures, facts.parents = [], []
    else:
        facts.notes = _findings(facts, stderr)
    facts.notes += [*_not_finite(facts), *_failed(facts)]
    return facts


def _is_drawn(recipe: str, metric: str) -> bool:
    """Whether a recipe's charts want this metric; of any other no curve is kept."""
    return any(panel.find([metric]) or metric == panel.over for panel in RECIPES[recipe].all_panels)


def _state(facts: StageFacts, ended: Path) -> tuple[str, str]:
    """(state, why) of a stage; `ended` is the folder in which its processes report what they ended with."""
    run_dir = facts.run_dir
    if is_complete(run_dir):
        return "complete", ""
    if not (run_dir / MARKER).is_file():
        return "not started", "`posttrain run` has not come to it"
    reached = f"at step {facts.log.step}" + (f" of {facts.log.max_steps}" if facts.log.max_steps else "")
    where = reached if facts.log.records else "before its first log"
    if _is_locked(run_dir):
        return "running", where
    failed = [g for g in facts.gates if not g["passed"]]
    if failed:
        return "gate failed", "; ".join(f"{g['name']}: {g['value']:.4g}, must be {g['accepted']}" for g in failed)
    message = next((r["message"] for r in read_reports(ended) if r["message"]), "")
    return "cut off", where + (f"; its last error: {redact(' '.join(message.split()))[:300]}" if message else "")


def _is_locked(run_dir: Path) -> bool:
    """Whether a process is training there now (`run_dir.lock`)."""
    path = run_dir / LOCK
    if not path.is_file():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _read_results(facts: StageFacts, lineage: Lineage) -> None:
    for name in ("config", "parents", "base", "data", "versions", "metrics", "cost"):
        if not isinstance(getattr(lineage, name), dict):
            raise TypeError(f"{name} is {getattr(lineage, name)!r}")
    facts.config = redact_values(lineage.config)
    for role, parent in lineage.parents.items():
        folder = resolve_parent(facts.run_dir, parent["path"])
        same = is_complete(folder) and read_lineage(folder).digest == parent["digest"]
        facts.parents.append(Parent(role, folder.name, parent["key"], parent["digest"], same))
    facts.entities = read_entities(facts.run_dir, lineage.metrics["measured_on"]) if "f1" in lineage.metrics else None
    for measure in headline(lineage, details=True):
        if measure.about.key == "f1" and facts.entities is not None:
            micro = facts.entities.scores[-1]
            measure = measure.with_interval(Share(micro.f1, micro.f1_low, micro.f1_high, facts.entities.sentences))
        if isinstance(measure.after, Share):
            facts.measures.append(measure)
        else:
            facts.numbers[measure.title] = measure.value


def _findings(facts: StageFacts, stderr: Path) -> list[Note]:
    """What PPO's health watch reported: from the lineage, or of a stage that is not complete from its stderr."""
    if facts.lineage is not None:
        found = facts.lineage.metrics.get("health", [])
        return [Note(f["step"], f"{f['name']}: {f['value']:.4g}, limit {f['limit']:.4g}", f["advice"]) for f in found]
    begun = read_alerts(facts.run_dir) or read_findings(_tail(stderr))
    return [Note(f.step, f.what, f.advice) for f in begun]


def _not_finite(facts: StageFacts) -> list[Note]:
    return [
        Note(None, f"{name}: {curve.not_finite:,} logged values are no finite number")
        for name, curve in facts.log.curves.items()
        if curve.not_finite
    ]


def _failed(facts: StageFacts) -> list[Note]:
    return [
        Note(None, f"gate {g['name']} failed: {g['value']:.4g}, must be {g['accepted']}", g.get("advice", ""))
        for g in facts.gates
        if not g["passed"]
    ]


def _read_gates(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / GATES
    if not path.is_file():
        return []
    try:
        gates = json.loads(path.read_text(encoding="utf-8"))
        return [
            {"name": str(g["name"]), "passed": bool(g["passed"]), "value": float(g["value"]),
             "accepted": str(g["accepted"]), "advice": str(g.get("advice", ""))}
            for g in gates
        ]  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError):  # broken JSON and half letters are ValueErrors
        return [{"name": GATES, "passed": False, "value": float("nan"), "accepted": "readable JSON"}]


def _changes(lineage: Lineage, stage: ChainStage) -> list[str]:
    """Keys whose value in the chain's files is not the one that the result was made with."""
    return [
        f"{key}: {then!r} then, {now!r} now" for key, (then, now) in changed_keys(lineage.config, stage.config).items()
    ]


def _relative(word: str) -> str:
    """A path below the working directory, as one would type it."""
    path = Path(word)
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else word


def _text(path: Path) -> str:
    return redact(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else f"({path} is not there)"


def _tail(path: Path, most: int = 200_000) -> list[str]:
    """The last lines of a text file."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - most))
        return file.read().decode("utf-8", errors="replace").splitlines()
