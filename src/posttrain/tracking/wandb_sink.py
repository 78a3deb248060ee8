"""W&B: one group per chain, one job type per stage; `step` is the optimizer's step.

Nothing is sent that is not in the record: no console, no code, no git remote, and only redacted arguments. An online
run uses its parents' artifacts and logs its own, which gives W&B's lineage graph. Offline W&B has no such graph, so
each run's config names the parents too. What could not be sent stays in the run directory, for `wandb sync`.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config.sections import TrackingSettings
from ..log import log_line
from ..redact import redact_arguments
from ..runs.lineage import Lineage, read_lineage, resolve_parent
from ..runs.paths import LINEAGE
from .identity import ALIAS, Identity, as_cell, note

STEP = "train/global_step"  # the x axis of transformers' own W&B runs
INIT_S, FINISH_S, ARTIFACT_S = 30, 120, 60


class WandbSink:
    """A W&B run, online or offline."""

    name = "wandb"

    def __init__(self, identity: Identity, config: dict[str, Any], settings: TrackingSettings, mode: Any) -> None:
        import wandb

        self.wandb, self.identity, self.mode = wandb, identity, mode
        self.artifacts = settings.wandb_artifacts
        before = offline_runs(identity.run_dir) if mode == "offline" else []
        self.project = settings.project or os.environ.get("WANDB_PROJECT") or "posttrain"
        with _redacted_arguments():
            self.run = wandb.init(
                project=self.project, entity=settings.wandb_entity, id=identity.id, resume="allow", mode=mode,
                name=settings.run_name or f"{identity.group}/{identity.stage}", group=identity.group,
                job_type=identity.stage, tags=[identity.recipe], dir=str(identity.run_dir), reinit="finish_previous",
                config={"chain": identity.chain, "stage": identity.stage, "recipe": identity.recipe, **config},
                settings=wandb.Settings(
                    console="off", save_code=False, disable_code=True, disable_git=True, silent=True,
                    init_timeout=INIT_S, finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT") or FINISH_S),
                    finish_timeout_raises=True,
                ),
            )  # fmt: skip
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP)
        self.last_step = self.run.step - 1 if self.run.resumed else last_step(before)
        folder = Path(self.run.dir).parent
        self.later = f"`wandb sync --include-online {folder}` sends what is missing"
        url = self.run.url if mode == "online" else None  # there is none offline, and W&B would warn
        note(identity.run_dir, wandb={"mode": mode, "project": self.project, "url": url})
        log_line(
            f"wandb: {url}" if url else f"wandb: `wandb leet {folder}` shows the run, `wandb sync {folder}` sends it"
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log({**metrics, STEP: step}, step=step)

    def log_table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        columns = list(dict.fromkeys(k for row in rows for k in row))
        data = [[as_cell(row.get(c)) for c in columns] for row in rows]
        self.run.log({name: self.wandb.Table(columns=columns, data=data, allow_mixed_types=True)}, step=step)

    def alert(self, title: str, text: str, step: int) -> None:
        self.run.alert(title=title, text=text, level="WARN")

    def update_config(self, config: Mapping[str, Any]) -> None:
        self.run.config.update(dict(config), allow_val_change=True)

    def log_lineage(self, lineage: Lineage) -> None:
        """Link the inputs of this stage, and log an artifact under the digest that its children record."""
        if self.artifacts == "none":
            return
        if self.mode == "online":
            self._use_parents(lineage)
        artifact = self.wandb.Artifact(
            self._artifact_name(lineage.stage), type=lineage.kind,
            metadata={"stage": lineage.stage, "key": lineage.key, "digest": lineage.digest},
        )  # fmt: skip
        for name in [LINEAGE, *(lineage.files if self.artifacts == "files" else ())]:
            artifact.add_file(str(self.identity.run_dir / name), name=name, policy="immutable", skip_cache=True)
        logged = self.run.log_artifact(artifact, aliases=["latest", lineage.digest[:ALIAS]])
        if self.mode == "online":
            logged.wait(timeout=ARTIFACT_S)

    def _use_parents(self, lineage: Lineage) -> None:
        for role, parent in lineage.parents.items():
            stage = read_lineage(resolve_parent(self.identity.run_dir, parent["path"])).stage
            name = f"{self.run.entity}/{self.project}/{self._artifact_name(stage)}:{parent['digest'][:ALIAS]}"
            try:
                self.run.use_artifact(name)
            except (self.wandb.errors.CommError, ValueError) as error:
                log_line(f"wandb: no link to {role} {name}, which was not logged online ({type(error).__name__})")

    def _artifact_name(self, stage: str) -> str:
        return f"{self.identity.chain}-{stage}" if self.identity.chain else stage

    def finish(self) -> None:
        self.run.finish()


def offline_runs(run_dir: Path) -> list[Path]:
    """The folders of a stage's offline runs, oldest first."""
    return sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda p: p.parent.name)


def last_step(files: list[Path]) -> int:
    """The last step in W&B's own files; -1 if none. A kill can leave a file without its last records.

    A file without even the record of its run is deleted, with its folder: `wandb sync` would stop there and not send
    the run's other files either. The stage's record has all of its data.
    """
    steps = [-1]
    for file in files:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", str(file), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=file.parent)
        records = [json.loads(line) for line in done.stdout.splitlines()]
        if done.returncode == 0 and not any(record.get("type") == "run" for record in records):
            shutil.rmtree(file.parent)
        steps += [int(r["history"]["item"]["_step"]) for r in records if r.get("type") == "history"]
    return max(steps)


@contextmanager
def _redacted_arguments() -> Iterator[None]:
    """Hide secrets from W&B, which keeps the command line of a run."""
    kept = sys.argv
    sys.argv = redact_arguments(kept)
    try:
        yield
    finally:
        sys.argv = kept
