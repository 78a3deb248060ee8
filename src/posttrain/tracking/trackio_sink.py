"""trackio: a local page like W&B's, in SQLite, without an account.

A chain is a project, a stage is a run. The data are in `.trackio` beside the stages, or in TRACKIO_DIR.
transformers' own callback is not used: it counts steps itself and sets no group.
"""

import contextlib
import io
import os
from collections.abc import Mapping
from typing import Any

from ..config.sections import TrackingSettings
from ..log import log_line
from ..runs.lineage import Lineage, read_lineage, resolve_parent
from ..runs.paths import LINEAGE
from .identity import ALIAS, Identity, as_cell, note, project_of, read_run

FOLDER = ".trackio"


class TrackioSink:
    """A run on a local trackio page."""

    name = "trackio"
    later = ""

    def __init__(self, identity: Identity, config: dict[str, Any], settings: TrackingSettings) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(identity.home / FOLDER))  # trackio reads it once, on import
        self.identity = identity
        with _quiet():
            import trackio
            from trackio.sqlite_storage import SQLiteStorage

            self.trackio = trackio
            kept = read_run(identity.run_dir).get("trackio")
            self.run = trackio.init(
                project=project_of(identity.chain), name=settings.run_name or identity.stage, group=identity.group,
                config={"stage": identity.stage, "recipe": identity.recipe, **config},
                resume="allow" if kept else "never", embed=False,
            )  # fmt: skip
            last = SQLiteStorage.get_max_step_for_run(self.run.project, self.run.name, run_id=self.run.id)
        self.last_step = -1 if last is None else int(last)
        note(identity.run_dir, trackio=self.run.id)
        log_line(f"trackio: `posttrain dashboard {identity.home}` shows the page")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def log_table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        columns = list(dict.fromkeys(k for row in rows for k in row))
        data = [[as_cell(row.get(c)) for c in columns] for row in rows]
        self.run.log({name: self.trackio.Table(columns=columns, data=data)}, step=step)

    def alert(self, title: str, text: str, step: int) -> None:
        with _quiet():
            self.run.alert(title=title, text=text, level=self.trackio.AlertLevel.WARN, step=step)

    def update_config(self, config: Mapping[str, Any]) -> None:
        """Make the next log carry the config again, which trackio sends with the first log of a run only."""
        self.run.config.update(config)
        self.run._config_logged = False
        self.run.log({}, step=max(0, self.run._next_step - 1))

    def log_lineage(self, lineage: Lineage) -> None:
        """Log the inputs of this stage, and its lineage.json under the digest that its children record."""
        with _quiet():
            for parent in lineage.parents.values():
                folder = resolve_parent(self.identity.run_dir, parent["path"])
                try:
                    self.run.use_artifact(f"{read_lineage(folder).stage}:{parent['digest'][:ALIAS]}")
                except ValueError:  # the parent ran without trackio; the config names it
                    continue
            artifact = self.trackio.Artifact(lineage.stage, type=lineage.kind, metadata={"digest": lineage.digest})
            artifact.add_file(self.identity.run_dir / LINEAGE)
            self.run.log_artifact(artifact, aliases=[lineage.digest[:ALIAS]])

    def finish(self) -> None:
        with _quiet():
            self.trackio.finish()


@contextlib.contextmanager
def _quiet() -> Any:
    """Suppress trackio's own lines on stdout."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
