"""Real clients: a chain of every recipe reports to trackio, and to W&B's client, which talks to a recording server."""

import json
import math
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import Browser
from recording_server import KEY, RecordingServer
from tiny_chain import STAGES, prepare

from posttrain.config.recipes import TRAINING
from posttrain.report.dashboard import sections_of
from posttrain.runs.paths import ALERTS, COMPLETIONS, METRICS
from posttrain.runs.record import read_records

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
SECRETS = {
    "HF_TOKEN": "hf_" + "PlantedHubToken" * 2, "TEAM_PASSWORD": "planted-password-1",
    "MINIO_SECRET": "planted/secret+2",
}  # fmt: skip
HUB_TOKEN = "planted-hub-token-3"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The chain, run once: its folder, what the server received, and what was printed."""
    folder = tmp_path_factory.mktemp("tiny")
    chain = prepare(folder, sft={"hub_token": HUB_TOKEN})
    with RecordingServer() as server:
        environment = {**os.environ, **SECRETS, **server.environment(), "POSTTRAIN_REPORT_TO": "trackio,wandb"}
        done = subprocess.run(
            [sys.executable, str(HERE / "tiny_chain.py"), str(folder)], env=environment, capture_output=True,
            text=True, timeout=570,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert not server.unknown
        yield SimpleNamespace(folder=folder, runs=folder / "runs", chain=chain, server=server, output=done.stdout)


def run_id(recorded, stage):
    return json.loads((recorded.runs / stage / "tracking.json").read_text())["id"]


def lineage(recorded, stage):
    return json.loads((recorded.runs / stage / "lineage.json").read_text())


def numbers(rows, leave=()):
    """(step, name) -> value, from rows (step, {name: value}); the last one if a name occurs twice at a step."""
    return {
        (step, name): float(value)
        for step, values in rows
        for name, value in values.items()
        if isinstance(value, (int, float)) and name not in leave and not math.isnan(value)
    }


def recorded_numbers(run_dir):
    rows = [(r["step"], r) for r in read_records(run_dir / METRICS)]
    return numbers(rows, leave={"step", "max_steps", "epoch", "time", "left_s"})


def trackio_numbers(folder, stage, project="tiny"):
    with closing(sqlite3.connect(folder / f"{project}.db")) as database:
        rows = database.execute("SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY id", (stage,)).fetchall()
    return numbers([(step, json.loads(metrics)) for step, metrics in rows])


@pytest.mark.parametrize("stage", STAGES)
def test_the_record_and_both_dashboards_have_the_same_names_steps_and_values(recorded, stage):
    here = recorded_numbers(recorded.runs / stage)
    assert len(here) > 20 or stage == "sample"
    history = recorded.server.runs[run_id(recorded, stage)].history
    own = {"_step", "_runtime", "_timestamp", "train/global_step"}
    assert numbers([(row["_step"], row) for row in history], leave=own) == here
    assert all(row["train/global_step"] == row["_step"] for row in history if "train/loss" in row)
    assert trackio_numbers(recorded.runs / ".trackio", stage) == here


def test_a_chain_is_a_group_and_a_stage_a_job_type(recorded):
    runs = {run.job_type: run for run in recorded.server.runs.values()}
    assert set(runs) == set(STAGES)
    assert {run.group for run in runs.values()} == {"tiny"}
    for stage, run in runs.items():
        assert run.name == run_id(recorded, stage)
        assert run.name.startswith(lineage(recorded, stage)["key"][:12])


def test_a_runs_config_has_configuration_and_lineage(recorded):
    config = recorded.server.runs[run_id(recorded, "ppo")].config
    assert config["learning_rate"] == 0.01
    parents = config["lineage"]["parents"]
    assert parents["reward"]["digest"] and parents == lineage(recorded, "ppo")["parents"]
    assert config["lineage"]["git_commit"] == lineage(recorded, "ppo")["git_commit"]
    assert {"torch", "trl", "wandb", "trackio"} <= config["environment"]["versions"].keys()
    assert config["environment"]["machine"]["cores"] >= 1
    assert config["performance"]["peak_flops"] > 1e6
    assert config["measured"]["peak_rss_bytes"] > 2**20


def test_an_online_run_links_its_parents_artifacts(recorded):
    names = {i: a["artifactCollectionName"] for i, a in recorded.server.artifacts.items()}
    stages = {run_id(recorded, stage): stage for stage in STAGES}
    edges = {(stages[run], names[artifact]) for run, artifact in recorded.server.used}
    assert edges == {
        (child, f"tiny-{parent}") for child, stage in STAGES.items() for parent in stage.get("inputs", {}).values()
    }
    logged = {a["artifactCollectionName"]: a for a in recorded.server.artifacts.values()}
    for stage in STAGES:
        metadata = json.loads(logged[f"tiny-{stage}"]["metadata"])
        child = {p["digest"] for s in STAGES for p in lineage(recorded, s)["parents"].values()}
        assert metadata["digest"] in child or stage not in ("sft", "reward")
    uploaded = [path for path in recorded.server.uploads if path.endswith("/lineage.json")]
    assert len(uploaded) == len(STAGES)


def test_completions_with_their_scores_are_logged_as_tables(recorded):
    drawn = list(read_records(recorded.runs / "ppo" / COMPLETIONS))
    tables = [json.loads(b) for path, b in recorded.server.uploads.items() if "samples/completions" in path]
    rows = {tuple(str(v) for v in row) for table in tables for row in table["data"]}
    assert tables[0]["columns"][:3] == ["prompt", "completion", "score"]
    assert drawn and {(d["prompt"], d["completion"], str(d["score"])) for d in drawn} <= {row[:3] for row in rows}
    answers = [json.loads(b) for path, b in recorded.server.uploads.items() if "samples/answers" in path]
    assert any({"prompt", "expected", "greedy"} <= set(table["columns"]) for table in answers)


def test_alerts_come_once_when_something_begins(recorded):
    found = lineage(recorded, "ppo")["metrics"]["health"]
    assert "kl runaway" in {f["name"] for f in found}
    written = list(read_records(recorded.runs / "ppo" / ALERTS))
    assert [a["title"] for a in written] == [f["name"] for f in found]
    assert [(a["title"], a["text"]) for a in recorded.server.alerts] == [(a["title"], a["text"]) for a in written]
    with closing(sqlite3.connect(recorded.runs / ".trackio" / "tiny.db")) as database:
        shown = database.execute("SELECT title, text, step FROM alerts ORDER BY id").fetchall()
    assert shown == [(a["title"], a["text"], a["step"]) for a in written]


def test_no_secret_is_sent_or_stored(recorded):
    files = [p for p in recorded.runs.rglob("*") if p.is_file() and "checkpoints" not in p.parts]
    assert len(files) > 50
    for secret in (*SECRETS.values(), HUB_TOKEN, KEY):
        assert secret not in recorded.output
        assert secret not in recorded.server.everything()
        assert not [p for p in files if secret.encode() in p.read_bytes()]


def test_every_panel_names_metrics_that_were_recorded(recorded):
    logged = {stage: {name for _, name in recorded_numbers(recorded.runs / stage)} for stage in STAGES}
    tables = {"ppo": {"samples/completions"}}
    for stage in ("sft", "dpo", "ppo", "ner"):
        tables.setdefault(stage, set()).add("samples/answers")
    for stage, names in tables.items():
        sent = {k for row in recorded.server.runs[run_id(recorded, stage)].history for k in row}
        assert names <= sent
        logged[stage] |= names
    checked = 0
    for section in sections_of(TRAINING):
        for panel in section.panels:
            for name in (*panel.metrics, *([panel.over] if panel.over else [])):
                if panel.everywhere:
                    assert any(name in logged[r] for r in panel.recipes), (section.title, panel.title, name)
                    checked += 1
    assert checked > 60
    assert {p.title for s in sections_of(TRAINING) for p in s.panels if not p.everywhere} == {
        "Peak CUDA memory, GiB", "Power, watts", "Energy, joules",
    }  # fmt: skip


def posttrain(recorded, *arguments):
    environment = {**os.environ, **recorded.server.environment()}
    command = [sys.executable, "-m", "posttrain.cli", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=recorded.folder)


def test_pushing_the_workspace_again_replaces_it(recorded):
    for _ in range(2):
        done = posttrain(recorded, "dashboard", recorded.chain, "--push")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().startswith(f"{recorded.server.url}/me/posttrain?nw=")
    first, second = recorded.server.views[-2:]
    assert first["name"] == second["name"]
    assert second["id"]
    spec = json.loads(second["spec"])
    sections = spec["section"]["panelBankConfig"]["sections"]
    titles = [section["name"] for section in sections]
    assert titles == [section.title for section in sections_of(TRAINING)]
    assert {"Overview", "SFT", "PPO", "DPO", "Named entities", "System and throughput", "Samples"} <= set(titles)
    charts = [p for section in sections for p in section["panels"]]
    assert len(charts) == sum(len(s.panels) for s in sections_of(TRAINING))
    (runs,) = spec["section"]["runSets"]
    assert [(f["key"]["name"], f["value"]) for f in runs["filters"]["filters"]] == [("chain", "tiny")]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="apt-get install chromium")
def test_trackios_page_shows_the_chain_in_a_browser(recorded, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "posttrain.cli", "dashboard", str(recorded.chain), "--no-browser", "--port", str(port)
    ]  # fmt: skip
    url, out = f"http://127.0.0.1:{port}", Path(os.environ.get("POSTTRAIN_SCREENSHOTS", tmp_path))
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        assert server.stdout.readline() == f"tiny: {url}/?project=tiny (Ctrl-C ends it)\n"
        with Browser(tmp_path / "profile") as page:
            page.open(f"{url}/?project=tiny")
            page.wait_for("document.querySelectorAll('canvas').length >= 6")
            for name in ("loss", "kl", "scores", "margins", "mfu", "tokens_per_s", "greedy_exact", *STAGES):
                assert re.search(rf"^{name}$", page.text, re.MULTILINE), name
            page.picture(out / "trackio-metrics.png")

            page.open(f"{url}/media?project=tiny")
            page.wait_for("document.querySelectorAll('table').length >= 4")
            assert {"samples/completions", "samples/answers"} <= set(page.text.splitlines())
            drawn = list(read_records(recorded.runs / "ppo" / COMPLETIONS))[-1]
            assert str(drawn["score"]) in page.text and "KL" in page.text.upper()
            page.picture(out / "trackio-tables.png")

            page.open(f"{url}/reports?project=tiny")
            page.wait_for("document.body.innerText.includes('Raise kl_coef')")

            page.open(f"{url}/artifacts?project=tiny")
            page.click("Lineage")
            page.wait_for("document.querySelectorAll('svg path').length > 2")
            time.sleep(1)
            assert {"dpo", "sft"} <= {word.partition(":")[0] for word in page.text.split()}
            page.picture(out / "trackio-lineage.png")
    finally:
        server.terminate()
        server.wait()
