"""The dashboard of a chain: a W&B workspace as code, and trackio's page on this machine.

A panel names metrics as the record has them; a test holds each against a recorded chain. A workspace shows the runs of
one chain, and only the sections of recipes that it has.
"""

import contextlib
import io
import json
import os
import time
import webbrowser
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..chain.graph import Chain, read_chain
from ..errors import ArtifactError, ConfigError
from ..fileio import write_atomically
from ..runs.paths import OWNER, RUN
from ..tracking.identity import LONE
from ..tracking.tracker import ANSWERS_TABLE, COMPLETIONS_TABLE
from ..tracking.trackio_sink import FOLDER
from ..tracking.wandb_sink import STEP, offline_runs

VIEW = "dashboard.json"  # in a chain's folder: the view that was pushed, to be pushed to again
POLICIES = ("sft", "dpo", "ppo")
TRAINING = (*POLICIES, "reward", "ner")
GREEDY = ("final/before/greedy_exact", "final/after/greedy_exact")
SAMPLED = ("final/before/sampled_exact", "final/after/sampled_exact")
PHASES = ("time/data", "time/forward", "time/backward", "time/optimizer", "time/other")
ROLLOUT = ("time/generation", "time/scoring", "time/evaluating")
CUDA = ("memory/peak_cuda_allocated_gib", "memory/peak_cuda_reserved_gib")


@dataclass(frozen=True)
class Panel:
    """One chart of `metrics` over the optimizer's step, or over `x`; or a table."""

    title: str
    metrics: tuple[str, ...] = ()
    x: str | None = None
    kind: str = "line"  # stacked-area; bars: the last value of each run; table: of the one name in `metrics`
    of: tuple[str, ...] | None = None  # recipes that log it; none: those of the section
    everywhere: bool = True  # False: whether it is logged depends on the device


@dataclass(frozen=True)
class Section:
    """Panels, and the recipes that log what they name."""

    title: str
    recipes: tuple[str, ...]
    panels: tuple[Panel, ...]


SECTIONS = (
    Section("Overview", TRAINING, (
        Panel("Loss of every stage", ("train/loss",)),
        Panel("Exact match, greedy", GREEDY, kind="bars", of=POLICIES),
        Panel("Exact match, sampled", SAMPLED, kind="bars", of=POLICIES),
        Panel("Completions that stop", ("final/stops",), kind="bars", of=POLICIES),
        Panel("Gradient norm", ("train/grad_norm",)),
        Panel("Learning rate", ("train/learning_rate",)),
        Panel("Seconds left", ("perf/left_s",)),
    )),
    Section("SFT", ("sft",), (
        Panel("Loss, training and validation", ("train/loss", "eval/loss")),
        Panel("Token accuracy", ("train/mean_token_accuracy", "eval/mean_token_accuracy")),
        Panel("Entropy", ("train/entropy",)),
        Panel("Tokens seen", ("train/num_tokens",)),
    )),
    Section("Reward model", ("reward",), (
        Panel("Pairs ranked right", ("train/accuracy",)),
        Panel("Margin", ("train/margin",)),
        Panel("Rewards: lowest, mean, highest", ("train/min_reward", "train/mean_reward", "train/max_reward")),
        Panel("Held-out pairs ranked right", ("final/held_out_accuracy",), kind="bars"),
    )),
    Section("PPO", ("ppo",), (
        Panel("Score", ("train/objective/scores",)),
        Panel("KL from the reference, nats a completion", ("train/objective/kl",)),
        Panel("Score against KL", ("train/objective/scores",), x="train/objective/kl"),
        Panel("Score less KL", ("train/objective/rlhf_reward",)),
        Panel("Spread of scores", ("train/objective/scores_std",)),
        Panel("KL coefficient", ("train/objective/kl_coef",)),
        Panel("Entropy", ("train/objective/entropy",)),
        Panel("Completion length", ("train/completions/mean_length",)),
        Panel("Completions that stop", ("train/completions/stopped",)),
        Panel("Losses", ("train/loss/policy", "train/loss/value")),
        Panel("How far the policy moved: approximate KL", ("train/policy/approx_kl",)),
        Panel("Clipped", ("train/policy/clip_fraction", "train/value/clip_fraction")),
        Panel("Ratio", ("train/policy/ratio",)),
        Panel("Critic: explained variance", ("train/value/explained_variance",)),
    )),
    Section("DPO", ("dpo",), (
        Panel("Rewards", ("train/rewards/chosen", "train/rewards/rejected")),
        Panel("Margin", ("train/rewards/margins",)),
        Panel("Pairs ranked right", ("train/rewards/accuracies",)),
        Panel("Log-probabilities", ("train/logps/chosen", "train/logps/rejected")),
        Panel("Logits", ("train/logits/chosen", "train/logits/rejected")),
        Panel("Entropy", ("train/entropy",)),
    )),
    Section("Named entities", ("ner",), (
        Panel("F1, precision and recall", ("eval/f1", "eval/precision", "eval/recall")),
        Panel("Loss, training and validation", ("train/loss", "eval/loss")),
        Panel("F1 on the test sentences", ("final/f1",), kind="bars"),
    )),
    Section("System and throughput", TRAINING, (
        Panel("Tokens a second", ("perf/tokens_per_s",)),
        Panel("Samples a second", ("perf/samples_per_s",)),
        Panel("Seconds a step", ("time/step",)),
        Panel("Where the seconds go", PHASES, kind="stacked-area"),
        Panel("Where a rollout's seconds go", ROLLOUT, kind="stacked-area", of=("ppo",)),
        Panel("Share of peak, percent", ("perf/mfu",)),
        Panel("Memory, GiB", ("memory/rss_gib", "memory/peak_rss_gib")),
        Panel("Peak CUDA memory, GiB", CUDA, everywhere=False),
        Panel("Power, watts", ("energy/watts",), everywhere=False),
        Panel("Energy, joules", ("energy/joules",), everywhere=False),
    )),
    Section("Samples", TRAINING, (
        Panel("Rollouts: completions and their scores", (COMPLETIONS_TABLE,), kind="table", of=("ppo",)),
        Panel("Answers to the test rows", (ANSWERS_TABLE,), kind="table", of=(*POLICIES, "ner")),
    )),
)  # fmt: skip


def sections_of(recipes: Collection[str]) -> list[Section]:
    """The sections, and of each the panels, that a chain of these recipes fills."""
    found = []
    for section in SECTIONS:
        panels = tuple(p for p in section.panels if set(p.of or section.recipes) & set(recipes))
        if panels:
            found.append(Section(section.title, section.recipes, panels))
    return found


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


def _panel(panel: Panel) -> Any:
    import wandb_workspaces.reports.v2 as wr

    if panel.kind == "table":
        return wr.WeavePanelSummaryTable(table_name=panel.metrics[0], layout=wr.Layout(w=24, h=12))
    if panel.kind == "bars":
        return wr.BarPlot(title=panel.title, metrics=list(panel.metrics))
    x, y = panel.x or STEP, list(panel.metrics)
    return wr.LinePlot(title=panel.title, x=x, y=y, smoothing_factor=0, plot_type=panel.kind)


def push(chain: Chain) -> str:
    """Save the chain's workspace on W&B, over the one that was saved before; its address. Raises ConfigError."""
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
    """A key that the chain's stages agree on, as far as they have it. Raises ConfigError where they do not."""
    found = {stage.config.values[key] for stage in chain.stages if stage.config.values.get(key)}
    if len(found) > 1:
        raise ConfigError(f"{chain.path}: its stages have several values of {key}: {', '.join(sorted(found))}")
    return next(iter(found), None)


# This machine


def show(path: Path, *, port: int | None = None, open_browser: bool = True) -> None:
    """Serve trackio's page until Ctrl-C. Raises ArtifactError where there is nothing to show.

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
    # trackio's own words on this are about a token that lets the page be written to; nobody needs it to look.
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
    """Where trackio's data of a chain or a stage are, under which project, and the run directories."""
    if path.is_file():
        chain = read_chain(path)
        return chain.output_dir, chain.name, [chain.run_dir(stage.name) for stage in chain.stages]
    owner = path / OWNER
    if owner.is_file():
        runs = sorted(marker.parent for marker in path.glob(f"*/{RUN}"))
        return path, json.loads(owner.read_text(encoding="utf-8"))["name"], runs
    if not (path / RUN).is_file():
        raise ArtifactError(f"{path} is no chain's file, no chain's output directory and no run directory")
    return path, LONE, [path]


def wandb_commands(runs: Iterable[Path]) -> Iterator[str]:
    """What W&B's own tools can do with the runs that it kept in run directories."""
    for run in runs:
        folders = [file.parent for file in offline_runs(run)]
        if folders:
            yield f"{run.name}: wandb leet {folders[-1]}"
            waiting = [str(f) for f in folders if not any(f.glob("*.synced"))]
            if waiting:
                yield f"{run.name}: wandb sync {' '.join(waiting)}"
