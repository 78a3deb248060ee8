"""A chain that is killed and started again ends where an undisturbed one does."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conftest import actions, edit
from posttrain.chain.graph import read_chain
from posttrain.chain.run import run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_processes")]


def test_kill_9_in_every_stage_and_the_same_command_again(chain, tmp_path):
    """Launcher, accelerate and recipe are killed somewhere inside each stage; in the end the tensors are the same."""
    (tmp_path / "sample.yaml").write_text(
        f"train_file: {tmp_path}/train.jsonl\nverifier: 'regex:[a-m].*'\nnum_samples: 16\ntemperature: 2.0\n"
        "max_new_tokens: 6\n"
    )
    settings = (tmp_path / "dpo.yaml").read_text().replace("pairs.jsonl", "train.jsonl").replace("beta: 0.1\n", "")
    (tmp_path / "ppo.yaml").write_text(settings + "max_completion_length: 6\nvalue_mode: adapter\n")
    stages = ("sft", "sample", "dpo", "reward", "ppo")  # as the chain runs them
    edit(chain, "stages:\n", "stages:\n  sample: {recipe: sample, config: sample.yaml, inputs: {policy: sft}}\n")
    edit(chain, "launch:", "  ppo:    {recipe: ppo, config: ppo.yaml, inputs: {policy: sft, reward: reward}}\nlaunch:")
    for name in ("reward", "dpo"):
        edit(chain, f"{name}.yaml, inputs: {{policy: sft}}", f"{name}.yaml, inputs: {{policy: sft, data: sample}}")
        edit(tmp_path / f"{name}.yaml", f"train_file: {tmp_path}/pairs.jsonl\n", "")
    run(read_chain(chain))
    seconds = {n: json.loads((tmp_path / "runs" / n / "lineage.json").read_text())["cost"]["wall_s"] for n in stages}

    edit(chain, f"{tmp_path}/runs", f"{tmp_path}/cut")
    moments = random.Random(0)
    for name in stages:
        wait_s = seconds[name] * moments.uniform(0.2, 0.6)
        while not was_cut_off(chain, tmp_path / "cut" / name, wait_s):
            shutil.rmtree(tmp_path / "cut" / name)  # the machine is faster than it was: earlier, then
            wait_s /= 2
            assert wait_s > 0.01
        assert actions(chain)[name] != "skip"
    run(read_chain(chain))
    for name in ("sft", "reward", "dpo", "ppo"):
        whole, cut = (tmp_path / folder / name / "adapter" / "adapter_model.safetensors" for folder in ("runs", "cut"))
        assert whole.read_bytes() == cut.read_bytes(), name


def was_cut_off(chain, stage_dir, wait_s):
    """Start the chain, kill it `wait_s` after the stage has begun; return whether that was before the stage's end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "posttrain.cli", "run", str(chain)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for((stage_dir / "stage.json").is_file)
    time.sleep(wait_s)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not running(stage_dir.parent), limit_s=5)  # accelerate and the recipe go with it
    return not (stage_dir / "lineage.json").exists()


def wait_for(condition, limit_s=120):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def running(folder):
    """Processes whose command line names `folder`."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if str(folder).encode() in file.read():
                    found.append(pid)
        except OSError:
            continue
    return found
