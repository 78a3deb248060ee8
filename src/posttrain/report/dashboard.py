"""The dashboard of a chain: a W&B workspace as code, and trackio's page on this machine.

The workspace has the panels and measures of the table of recipes, like the report, under the record's names; a test
checks each name against a recorded chain. It shows the runs of one chain, and only the sections of its recipes.
"""

import contextlib
import io
import json
import os
import time
import webbrowser
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..chain.graph import Chain, read_chain
from ..config.metrics import GRADIENT, LEARNING_RATE, ROLLOUT_SPEED, SPEED, STOPS, Measured, Panel
from ..config.recipes import RECIPES, Recipe
from ..errors import ArtifactError, ConfigError
from ..fileio import write_atomically
from ..runs.paths import OWNER, RUN
from ..runs.record import metric_name
from ..tracking.identity import LONE
from ..tracking.tracker import ANSWERS_TABLE, COMPLETIONS_TABLE
from ..tracking.trackio_sink import FOLDER
from ..tracking.wandb_sink import STEP, offline_runs

VIEW = "dashboard.json"  # in a chain's folder: the view that was pushed, to be updated by the next push


@dataclass(frozen=True)
class WorkspacePanel:
    """One panel of a W&B workspace.

    Attributes:
        title: its heading.
        kind: `lines` over steps, `stacked` areas, `bars` of each run's last value, or a `table` of samples.
        metrics: names as in the record (`train/loss`); for a table, its name.
        over: the metric on the horizontal axis; None: the optimizer's step.
        recipes: those that log these metrics.
        everywhere: False if they are logged on some devices only.
    """

    title: str
    kind: str
    metrics: tuple[str, ...]
    recipes: tuple[str, ...]
    over: str | None = None
    everywhere: bool = True


@dataclass(frozen=True)
class Section:
    title: str
    panels: tuple[WorkspacePanel, ...]


def sections_of(recipes: Collection[str]) -> list[Section]:
    """The sections for a chain of these recipes, from their rows in the table; empty ones are left out."""
    rows = {name: recipe for name, recipe in RECIPES.items() if name in recipes and recipe.trainer is not None}
    trained = tuple(rows)
    drawing = tuple(name for name, row in rows.items() if row.draws)
    asked = tuple(name for name, row in rows.items() if row.answers_prompts or row.makes == "tagger")
    loss = WorkspacePanel("Loss per stage", "lines", ("train/loss",), trained)
    left = WorkspacePanel("Seconds left", "lines", ("perf/left_s",), trained)
    shared = [_panel_of(panel, trained) for panel in (GRADIENT, LEARNING_RATE)]
    speed = [_panel_of(panel, trained) for panel in SPEED] + [_panel_of(ROLLOUT_SPEED, drawing)]
    samples = [
        WorkspacePanel("Rollouts: completions and their scores", "table", (COMPLETIONS_TABLE,), drawing),
        WorkspacePanel("Answers to the test rows", "table", (ANSWERS_TABLE,), asked),
    ]
    sections = [
        Section("Overview", (loss, *_bars(rows), *shared, left)),
        *(Section(row.label, tuple(_panel_of(p, (name,)) for p in row.panels)) for name, row in rows.items()),
        Section("System and throughput", tuple(speed)),
        Section("Samples", tuple(samples)),
    ]
    filled = (Section(s.title, tuple(p for p in s.panels if p.metrics and p.recipes)) for s in sections)
    return [section for section in filled if section.panels]


def _panel_of(panel: Panel, recipes: tuple[str, ...]) -> WorkspacePanel:
    """A panel with the record's names. Patterns are left out, since W&B needs names."""
    names = tuple(metric_name(name) for name in panel.metrics if "*" not in name)
    over = metric_name(panel.over) if panel.over else None
    title = f"{panel.title}, {panel.unit}" if panel.unit else panel.title
    return WorkspacePanel(title, "stacked" if panel.stacked else "lines", names, recipes, over, panel.everywhere)


def _bars(rows: Mapping[str, Recipe]) -> list[WorkspacePanel]:
    """One chart per measure of finished stages: after, and before if it was measured."""
    by_measure: dict[Measured, list[str]] = {}
    for name, row in rows.items():
        for about in row.measures:
            if about.kind in ("share", "rate") and (about.headline or about.key == STOPS.key):
                by_measure.setdefault(about, []).append(name)
    return [
        WorkspacePanel(about.name.capitalize(), "bars", _final_names(about), tuple(names))
        for about, names in by_measure.items()
    ]


def _final_names(about: Measured) -> tuple[str, ...]:
    if about.paired:
        return f"final/before/{about.key}", f"final/after/{about.key}"
    return (f"final/{about.key}",)


# W&B


def build_workspace(chain: str, recipes: Collection[str], *, entity: str, project: str) -> Any:
    """A `wandb_workspaces` Workspace over the runs of one chain. Needs no login."""
    import wandb_workspaces.workspaces as ws

    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"posttrain: {chain}",
        sections=[
            ws.Section(
                name=section.title, panels=[_panel(panel) for panel in section.panels], is_open=True,
                layout_settings=ws.SectionLayoutSettings(columns=3, rows=-(-len(section.panels) // 3)),
            )
            for section in sections_of(recipes)
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP),
        runset_settings=ws.RunsetSettings(filters=[ws.Config("chain") == chain]),
    )  # fmt: skip


def _panel(panel: WorkspacePanel) -> Any:
    import wandb_workspaces.reports.v2 as wr

    if panel.kind == "table":
        return wr.WeavePanelSummaryTable(table_name=panel.metrics[0], layout=wr.Layout(w=24, h=12))
    if panel.kind == "bars":
        return wr.BarPlot(title=panel.title, metrics=list(panel.metrics))
    return wr.LinePlot(
        title=panel.title, x=panel.over or STEP, y=list(panel.metrics), smoothing_factor=0,
        plot_type="stacked-area" if panel.kind == "stacked" else "line",
    )  # fmt: skip


def push(chain: Chain) -> str:
    """Save the chain's workspace on W&B, replacing an earlier one; return its address. Raises ConfigError."""
    from ..tracking.wandb_server import WandbServer

    server = WandbServer.configured()
    trouble = server.no_auth or server.trouble(10.0)
    if trouble:
        raise ConfigError(f"dashboard --push: {trouble}")
    import wandb

    entity = _setting(chain, "wandb_entity") or os.environ.get("WANDB_ENTITY") or wandb.Api().default_entity
    project = _setting(chain, "project") or os.environ.get("WANDB_PROJECT") or LONE
    recipes = {stage.config.recipe for stage in chain.stages}
    workspace = build_workspace(chain.name, recipes, entity=entity, project=project)
    kept = chain.output_dir / VIEW
    if kept.is_file():
        view = json.loads(kept.read_text(encoding="utf-8"))
        workspace._internal_name, workspace._internal_id = view["name"], view["id"]
    workspace.save()
    if chain.output_dir.is_dir():
        view = {"name": workspace._internal_name, "id": workspace._internal_id, "url": workspace.url}
        write_atomically(kept, json.dumps(view) + "\n")
    return str(workspace.url)


def _setting(chain: Chain, key: str) -> Any:
    """The value of a key that must be the same in all stages that have it. Raises ConfigError if it is not."""
    found = {stage.config.values[key] for stage in chain.stages if stage.config.values.get(key)}
    if len(found) > 1:
        raise ConfigError(f"{chain.path}: its stages have different values of {key}: {', '.join(sorted(found))}")
    return next(iter(found), None)


# This machine


def show(path: Path, *, port: int | None = None, open_browser: bool = True) -> None:
    """Serve trackio's page until Ctrl-C. Raises ArtifactError if there is nothing to show.

    `path` is a chain's file, its output directory, or the run directory of a stage alone.
    """
    home, project, runs = locate(path)
    for line in wandb_commands(runs):
        print(line, flush=True)
    folder = Path(os.environ.get("TRACKIO_DIR") or home / FOLDER).resolve()
    if not (folder / f"{project}.db").is_file():
        raise ArtifactError(f"{folder} has no data of {project}: run it with report_to: trackio")
    os.environ["TRACKIO_DIR"] = str(folder)
    try:
        import trackio
    except ImportError as error:
        raise ConfigError("trackio is not installed; run `pip install 'posttrain[trackio]'`") from error
    # trackio's own message is about a token for writing to the page, which is not needed for looking at it.
    with contextlib.redirect_stdout(io.StringIO()):
        server, url, *_ = trackio.show(open_browser=False, block_thread=False, server_port=port)
    address = f"{url.rstrip('/')}/?project={project}"
    print(f"{project}: {address} (Ctrl-C ends it)", flush=True)
    if open_browser:
        webbrowser.open(address)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        server.close()


def locate(path: Path) -> tuple[Path, str, list[Path]]:
    """The folder of trackio's data for a chain or a stage, the project, and the run directories."""
    if path.is_file():
        chain = read_chain(path)
        return chain.output_dir, chain.name, [chain.run_dir(stage.name) for stage in chain.stages]
    owner = path / OWNER
    if owner.is_file():
        runs = sorted(marker.parent for marker in path.glob(f"*/{RUN}"))
        return path, json.loads(owner.read_text(encoding="utf-8"))["name"], runs
    if not (path / RUN).is_file():
        raise ArtifactError(f"{path} is neither a chain's file, nor a chain's output directory, nor a run directory")
    return path, LONE, [path]


def wandb_commands(runs: Iterable[Path]) -> Iterator[str]:
    """Commands of W&B's own tools for the runs kept in run directories."""
    for run in runs:
        folders = [file.parent for file in offline_runs(run)]
        if folders:
            yield f"{run.name}: wandb leet {folders[-1]}"
            waiting = [str(f) for f in folders if not any(f.glob("*.synced"))]
            if waiting:
                yield f"{run.name}: wandb sync {' '.join(waiting)}"
