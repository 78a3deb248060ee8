"""A server that refuses the key, one that goes away, a kill: training continues, and nothing is lost or sent twice."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from recording_server import RecordingServer
from test_clients import numbers, recorded_numbers, trackio_numbers

from posttrain.launch import ROOT
from posttrain.runs.paths import METRICS
from posttrain.runs.record import read_records

pytestmark = pytest.mark.slow
STEPS = 40
SMALL = [
    "--per_device_train_batch_size", "4", "--gradient_checkpointing", "false", "--logging_steps", "1", "--max_steps",
    str(STEPS), "--learning_rate", "0.001", "--save_steps", "10", "--adapter.r", "4", "--adapter.alpha", "8",
    "--gates.stops", "0", "--max_new_tokens", "2", "--report_to", "[trackio, wandb]",
]  # fmt: skip


@pytest.fixture
def start(tiny, data, tmp_path):
    """Start SFT in tmp_path/run with an environment; its process, whose output goes to a file."""
    run = tmp_path / "run"

    def go(**environment):
        command = [
            sys.executable, str(ROOT / "recipes" / "sft.py"), "--model_name_or_path", str(tiny), "--train_file",
            str(data), "--output_dir", str(run), *SMALL,
        ]  # fmt: skip
        with (tmp_path / "out.txt").open("a") as out:
            return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment})

    yield run, go
    assert "Traceback" not in (tmp_path / "out.txt").read_text()


def wait_for(what, process, seconds=240):
    for _ in range(seconds * 50):
        if what():
            return
        assert process.poll() is None, "the stage ended before"
        time.sleep(0.02)
    raise AssertionError("it took too long")


def steps_of(run):
    return [r["step"] for r in read_records(run / METRICS) if "train/loss" in r]


def inspect(folder):
    """The records in a run's file, by W&B's own reader."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=folder)
    return [json.loads(line) for line in done.stdout.splitlines()]


def sync(server, folders, *options):
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *options, *map(str, folders)]
    environment = {**os.environ, **server.environment()}
    where = folders[0].parent.parent  # W&B's tools leave their own logs where they are run
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, cwd=where)


def test_after_a_refused_key_and_a_kill_wandb_sync_sends_everything_once(start, tmp_path):
    run, go = start
    with RecordingServer(refuse=True) as refusing:
        first = go(**refusing.environment())
        wait_for(lambda: len(steps_of(run)) >= 15, first)
        first.send_signal(signal.SIGKILL)
        first.wait()
        reached = steps_of(run)[-1]
        second = go(**refusing.environment())
        assert second.wait(timeout=300) == 0
    output = (tmp_path / "out.txt").read_text()
    assert output.count("refused the key") == 2  # once per start
    assert f"resuming from {run}/checkpoints/checkpoint-" in output
    assert "dropped at step" not in output and "not started" not in output

    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) in (1, 2)  # the first is deleted, and its data sent again, if W&B had not written its run yet
    runs = [next(r["run"] for r in inspect(f) if r["type"] == "run") for f in folders]
    identity = json.loads((run / "tracking.json").read_text())["id"]
    assert {r["run_id"] for r in runs} == {identity}
    assert {(r["run_group"], r["job_type"]) for r in runs} == {("run", "run")}
    seen = [[r["history"]["item"]["_step"] for r in inspect(f) if r["type"] == "history"] for f in folders]
    assert [step for steps in seen for step in steps] == list(range(1, STEPS + 1)), reached

    here = recorded_numbers(run)
    assert {step for step, _ in here} == set(range(1, STEPS + 1))
    assert trackio_numbers(run / ".trackio", "run", "posttrain").keys() == here.keys()
    with RecordingServer() as server:
        done = sync(server, folders)
        assert done.returncode == 0, done.stdout + done.stderr
        sent = server.runs[identity]
    assert (sent.group, sent.job_type) == ("run", "run")
    own = {"_step", "_runtime", "_timestamp", "train/global_step"}
    there = numbers([(row["_step"], row) for row in sent.history], leave=own)
    assert there.keys() == here.keys()
    exact = [k for k in here if k[1] in ("train/loss", "train/learning_rate", "train/num_tokens")]
    assert {k: there[k] for k in exact} == pytest.approx({k: here[k] for k in exact})


def test_training_continues_when_the_server_goes_away(start, tmp_path):
    run, go = start
    with RecordingServer() as server:
        process = go(**server.environment(), WANDB_FINISH_TIMEOUT="3")
        wait_for(lambda: len(steps_of(run)) >= 5, process)
    left = time.monotonic()
    assert process.wait(timeout=300) == 0
    assert time.monotonic() - left < 120
    output = (tmp_path / "out.txt").read_text()
    assert f"complete: {run}/adapter" in output
    (folder,) = (run / "wandb").glob("run-*")
    assert output.count("wandb: dropped at step") == 1
    assert f"`wandb sync --include-online {folder}` sends what is missing" in output
    with RecordingServer() as later:
        done = sync(later, [folder], "--include-online")
        assert done.returncode == 0, done.stdout + done.stderr
        (sent,) = later.runs.values()
    assert [row["_step"] for row in sent.history] == list(range(1, STEPS + 1))
