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
from ..config.stage_config import UNKEYED
from ..config.values import flatten
from ..errors import ArtifactError
from ..intervals import Share, wilson
from ..launch import build_command
from ..launch.exit_files import read_reports
from ..redact import redact, redact_values
from ..runs.lineage import Lineage, is_complete, read_lineage, resolve_parent
from ..runs.paths import COMPLETIONS, METRICS
from .answers import SideBySide, read_side_by_side
from .curves import Log, read_log, sample_lines
from .entities import Entities, read_entities
from .health import read_alerts, read_findings
from .panels import is_plotted

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
class Measure:
    """One number of a stage with its 95% interval, before it, after it, and the change row by row."""

    name: str
    after: Share
    before: Share | None = None
    change: Share | None = None

    @property
    def verdict(self) -> str:
        """better, worse, or no clear change: whether the interval of the change holds 0. Empty without one."""
        if self.change is None:
            return ""
        return "better" if self.change.low > 0 else "worse" if self.change.high < 0 else "no clear change"


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
        if s.complete and s.recipe not in ("ner", "reward", "sample")
    ]
    answers = read_side_by_side(asked)
    missing = [f"{s.name}: {s.state}; {s.why}" for s in stages if not s.complete]
    if answers is None and any(s.complete and s.recipe in ("sft", "dpo", "ppo") for s in stages):
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
    stderr = chain.output_dir / ".logs" / f"{stage.name}.stderr"
    facts.log = read_log(run_dir / METRICS, lambda key: is_plotted(recipe, key))
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


def _state(facts: StageFacts, ended: Path) -> tuple[str, str]:
    """(state, why) of a stage; `ended` is the folder in which its processes report what they ended with."""
    run_dir = facts.run_dir
    if is_complete(run_dir):
        return "complete", ""
    if not (run_dir / "stage.json").is_file():
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
    path = run_dir / ".lock"
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
    m = lineage.metrics
    for name in ("greedy", "sampled"):
        key = f"{name}_exact"
        if key in m.get("after", {}):
            facts.measures.append(
                Measure(f"exact match, {name}", *(_share(m, when, key) for when in ("after", "before", "change")))  # type: ignore[arg-type]
            )
    if "held_out_accuracy" in m:
        pairs = m["held_out_pairs"]
        facts.measures.append(Measure("held-out pairs ranked right", wilson(m["held_out_accuracy"] * pairs, pairs)))
    if "f1" in m:
        facts.entities = read_entities(facts.run_dir, m["measured_on"])
        if facts.entities is not None:
            micro = facts.entities.scores[-1]
            share = Share(micro.f1, micro.f1_low, micro.f1_high, facts.entities.sentences)
            facts.measures.append(Measure("entity F1", share))
    if lineage.kind == "data":
        facts.numbers["pairs"] = f"{m['pairs']:,} of {m['prompts']:,} prompts"
        facts.numbers["mean score of a completion"] = f"{m['mean_score']:.3f}"
    if "objective/kl" in m:
        facts.numbers["KL from its start, at the end"] = f"{m['objective/kl']:.3g} nats a completion"
    if "stops" in m:
        facts.numbers["completions that stop by themselves"] = f"{m['stops']:.1%}"


def _share(metrics: Mapping[str, Any], when: str, key: str) -> Share | None:
    part = metrics.get(when, {})
    if key not in part:
        return None
    rows = int(metrics["after"].get("rows", 0))
    return Share(part[key], part[f"{key}_low"], part[f"{key}_high"], rows)


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
    path = run_dir / "gates.json"
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
        return [{"name": "gates.json", "passed": False, "value": float("nan"), "accepted": "readable JSON"}]


def _changes(lineage: Lineage, stage: ChainStage) -> list[str]:
    """Keys whose value in the chain's files is not the one that the result was made with."""
    then, now = (flatten(redact_values(c)) for c in (lineage.config, stage.config.to_dict()))
    ignored = {*UNKEYED, "inputs"}
    return [
        f"{key}: {then.get(key)!r} then, {value!r} now"
        for key, value in now.items()
        if key.partition(".")[0] not in ignored
        and json.dumps(then.get(key), default=str) != json.dumps(value, default=str)
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
