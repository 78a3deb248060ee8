"""A run directory and its `lineage.json`: what a stage made, from what, and hashes that prove it unaltered.

    runs/<chain>/<stage>/
      config.yaml      the effective configuration
      metrics.jsonl    one object per log
      checkpoints/     to resume from, removed when the stage is complete
      adapter/ | model/ | data/ | evaluation/    the result; a model's card is its README.md
      answers/         the policy's answers to the test rows, before the stage and after it
      lineage.json     written last, atomically: its presence means that the stage is complete

Files, parents and base are verified before weights are read. "The latest checkpoint" is never guessed.
Weights are safetensors only. Imports no torch.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from ..fileio import sha256_file, write_atomically
from .fingerprints import check_safetensors, fingerprint_base
from .paths import ANSWERS, CARD, LINEAGE

VERSIONED = ("posttrain", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


@dataclass
class Lineage:
    """The content of `lineage.json`. Paths in `parents` are relative to the run directory."""

    stage: str
    recipe: str
    kind: str  # adapter | model | data | evaluation
    key: str
    config: dict[str, Any]
    task: str | None = None  # CAUSAL_LM | SEQ_CLS | TOKEN_CLS
    start: str | None = None  # continue | merge: how it started from the policy input
    parents: dict[str, dict[str, str]] = field(default_factory=dict)  # role -> {path, key, digest}
    base: dict[str, Any] = field(default_factory=dict)  # name, revision, fingerprint, dtype, quantisation
    chat_template_sha256: str | None = None
    tokenizer_sha256: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    git_commit: str | None = None
    seed: int | None = None
    world_size: int = 1
    metrics: dict[str, Any] = field(default_factory=dict)
    gates: list[dict[str, Any]] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)  # wall_s, peak_rss_bytes, trained_parameters
    files: dict[str, str] = field(default_factory=dict)  # path in the run directory -> sha256
    format: int = 1

    @property
    def digest(self) -> str:
        """SHA-256 over the hashes of the result's files; a child records its parent's."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()


def is_complete(run_dir: Path) -> bool:
    return (run_dir / LINEAGE).is_file()


def read_lineage(run_dir: Path) -> Lineage:
    """Read `lineage.json`. Raises ArtifactError if the stage is missing or incomplete."""
    path = run_dir / LINEAGE
    if not run_dir.is_dir():
        raise ArtifactError(f"{run_dir} does not exist (looked in {Path.cwd()}); run the stage that makes it first")
    if not path.is_file():
        raise ArtifactError(f"{run_dir} has no {LINEAGE}: that stage has not finished; run it again to resume it")
    try:
        return Lineage(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); run the stage again") from error


def verify(run_dir: Path, *, parents: bool = True) -> Lineage:
    """Read and verify a run's lineage: files unaltered, base unchanged, parents present and the same.

    Raises ArtifactError that names what differs. Reads all of the result's files (an adapter: megabytes), but only
    samples of the base (`fingerprint_base`).
    """
    lineage = read_lineage(run_dir)
    for name, expected in lineage.files.items():
        path = run_dir / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing, so {run_dir} is incomplete: run its stage again")
        if name.endswith(".safetensors"):
            check_safetensors(path)
        if sha256_file(path) != expected:
            raise ArtifactError(
                f"{path} was altered since its stage finished; run that stage again, or restore the file"
            )
    if lineage.base and Path(lineage.base["name"]).is_dir():
        now = fingerprint_base(Path(lineage.base["name"]))
        if now != lineage.base["fingerprint"]:
            raise ArtifactError(
                f"{run_dir} was made on another base: {lineage.base['name']} has fingerprint {now[:12]} now, "
                f"{lineage.base['fingerprint'][:12]} then; restore the base, or run the chain again on the new one"
            )
    if parents:
        for role, parent in lineage.parents.items():
            parent_dir = resolve_parent(run_dir, parent["path"])
            if not is_complete(parent_dir):
                raise ArtifactError(f"{run_dir}: its {role} parent {parent_dir} is missing; restore it or run it again")
            if read_lineage(parent_dir).digest != parent["digest"]:
                raise ArtifactError(
                    f"{run_dir}: its {role} parent {parent_dir} is not the one it was made from; run this stage again"
                )
    return lineage


def resolve_parent(run_dir: Path, path: str) -> Path:
    return Path(os.path.normpath(run_dir / path))


def parent_record(run_dir: Path, parent_dir: Path) -> dict[str, str]:
    """What a child records of a parent; the path is relative, so that a chain's folder can be moved."""
    lineage = read_lineage(parent_dir)
    relative = os.path.relpath(parent_dir.resolve(), run_dir.resolve())
    return {"path": relative, "key": lineage.key, "digest": lineage.digest}


def hash_files(run_dir: Path, result: str) -> dict[str, str]:
    """Path in the run directory -> SHA-256, of each file of the result and of the answers."""
    files = [p for folder in (result, ANSWERS) for p in sorted((run_dir / folder).rglob("*")) if p.is_file()]
    return {str(p.relative_to(run_dir)): sha256_file(p) for p in files if p != run_dir / result / CARD}


def write_lineage(run_dir: Path, lineage: Lineage) -> None:
    """Write `lineage.json` atomically: the stage is complete."""
    write_atomically(run_dir / LINEAGE, json.dumps(asdict(lineage), indent=2, ensure_ascii=False, default=str) + "\n")


# What a lineage records about its environment


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in VERSIONED}


def git_commit() -> str | None:
    """The commit of the code, with `-dirty` if files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
