"""The graph decides what runs: skip what is complete, resume what was cut off, re-run what depends on a change."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT, WORDS, write_jsonl
from posttrain.chain import plan, read_chain, run
from posttrain.errors import ArtifactError, ConfigError

SMALL = """
per_device_train_batch_size: 4
learning_rate: 0.01
gradient_checkpointing: false
logging_steps: 1
save_steps: 1
max_steps: 4
adapter: {r: 4, alpha: 8}
gates: {stops: 0}
"""


@pytest.fixture
def chain(tiny, tmp_path):
    """SFT, then a reward model and DPO from it."""
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": f"{w[1:]} ->", "completion": f" {w}"} for w in WORDS])
    write_jsonl(
        tmp_path / "pairs.jsonl",
        [{"prompt": f"{w[1:]} ->", "chosen": f" {w}", "rejected": f" {w[::-1]}"} for w in WORDS],
    )
    (tmp_path / "sft.yaml").write_text(
        f"model_name_or_path: {tiny}\ntrain_file: {tmp_path}/train.jsonl\nmax_new_tokens: 4\n{SMALL}"
    )
    (tmp_path / "dpo.yaml").write_text(f"train_file: {tmp_path}/pairs.jsonl\nbeta: 0.1\nmax_new_tokens: 4\n{SMALL}")
    (tmp_path / "reward.yaml").write_text(f"train_file: {tmp_path}/pairs.jsonl\n{SMALL}")
    (tmp_path / "chain.yaml").write_text(
        f"""name: tiny
output_dir: {tmp_path}/runs
stages:
  dpo:    {{recipe: dpo, config: dpo.yaml, inputs: {{policy: sft}}}}
  sft:    {{recipe: sft, config: sft.yaml}}
  reward: {{recipe: reward, config: reward.yaml, inputs: {{policy: sft}}}}
launch: {{accelerate_config: cpu.yaml}}
"""
    )
    return tmp_path / "chain.yaml"


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def actions(chain):
    return {p.stage.name: p.action for p in plan(read_chain(chain))}


def tensors(chain, stage):
    return (chain.parent / "runs" / stage / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_chain_runs_is_skipped_and_reruns_what_changed(chain, capfd):
    assert actions(chain) == {"sft": "run", "dpo": "run", "reward": "run"}
    run(read_chain(chain))
    out = capfd.readouterr().out
    assert re.search(r"sft .*trained", out.replace("\n", " "))
    assert actions(chain) == {"sft": "skip", "dpo": "skip", "reward": "skip"}

    edit(chain.parent / "dpo.yaml", "beta: 0.1", "beta: 0.2")
    plans = {p.stage.name: p for p in plan(read_chain(chain))}
    assert {n: p.action for n, p in plans.items()} == {"sft": "skip", "dpo": "run", "reward": "skip"}
    assert "beta: 0.1 -> 0.2" in plans["dpo"].reason

    before = tensors(chain, "dpo")
    run(read_chain(chain))
    assert tensors(chain, "dpo") != before
    kept = list((chain.parent / "runs" / ".previous").iterdir())
    assert len(kept) == 1
    assert (kept[0] / "adapter" / "adapter_model.safetensors").read_bytes() == before

    # Data are read by content: a moved file is the same file, a changed row is not.
    (chain.parent / "train.jsonl").rename(chain.parent / "moved.jsonl")
    edit(chain.parent / "sft.yaml", "train.jsonl", "moved.jsonl")
    assert set(actions(chain).values()) == {"skip"}
    edit(chain.parent / "moved.jsonl", '" receive"', '" receives"')
    assert set(actions(chain).values()) == {"run"}
    edit(chain.parent / "moved.jsonl", '" receives"', '" receive"')

    # A finished stage that was altered is refused, not trained on.
    config = chain.parent / "runs" / "sft" / "adapter" / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ArtifactError, match=r"adapter_config.json was altered"):
        plan(read_chain(chain))


def test_kill_9_in_every_stage_and_the_same_command_again(chain, tmp_path):
    """Launcher, accelerate and recipe are killed somewhere inside each stage; in the end the tensors are the same."""
    (tmp_path / "sample.yaml").write_text(
        f"train_file: {tmp_path}/train.jsonl\nverifier: 'regex:[a-m].*'\nnum_samples: 16\ntemperature: 2.0\n"
        "max_new_tokens: 6\n"
    )
    stages = ("sft", "sample", "dpo", "reward")  # as the chain runs them
    edit(chain, "stages:\n", "stages:\n  sample: {recipe: sample, config: sample.yaml, inputs: {policy: sft}}\n")
    for name in ("reward", "dpo"):
        edit(chain, f"{name}.yaml, inputs: {{policy: sft}}", f"{name}.yaml, inputs: {{policy: sft, data: sample}}")
        edit(tmp_path / f"{name}.yaml", f"train_file: {tmp_path}/pairs.jsonl\n", "")
    run(read_chain(chain))
    seconds = {n: json.loads((tmp_path / "runs" / n / "lineage.json").read_text())["cost"]["wall_s"] for n in stages}

    edit(chain, f"{tmp_path}/runs", f"{tmp_path}/cut")
    moments = random.Random(0)
    for name in stages:
        process = subprocess.Popen(
            [sys.executable, "-m", "posttrain.cli", "run", str(chain)], stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for((tmp_path / "cut" / name / "stage.json").is_file)
        time.sleep(seconds[name] * moments.uniform(0.2, 0.8))
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_for(lambda: not running(tmp_path / "cut"))
        assert not (tmp_path / "cut" / name / "lineage.json").exists()
        assert actions(chain)[name] != "skip"
    run(read_chain(chain))
    for name in ("sft", "reward", "dpo"):
        whole, cut = (tmp_path / folder / name / "adapter" / "adapter_model.safetensors" for folder in ("runs", "cut"))
        assert whole.read_bytes() == cut.read_bytes(), name


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


def test_dry_run_touches_nothing(chain, capsys):
    run(read_chain(chain), dry_run=True)
    assert "not there yet" in capsys.readouterr().out
    assert not (chain.parent / "runs").exists()


def test_another_chains_directory_is_refused(chain):
    folder = chain.parent / "runs"
    folder.mkdir()
    (folder / "chain.json").write_text(json.dumps({"name": "theirs", "file": "/x.yaml"}))
    with pytest.raises(ArtifactError, match=r"belongs to the chain 'theirs'"):
        run(read_chain(chain))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("policy: sft", "policy: sfd", r"names no stage: 'sfd'; did you mean 'sft'\?"),
        ("recipe: dpo", "recipe: dpq", r"unknown recipe 'dpq'"),
        ("{policy: sft}", "{polcy: sft}", r"dpo has no input 'polcy'"),
        ("{recipe: sft, config: sft.yaml}", "{recipe: sft, config: sft.yaml, inputs: {policy: dpo}}", r"circle"),
        ("config: sft.yaml", "config: no.yaml", r"no.yaml: no such file"),
        ("launch:", "lunch:", r"unknown key 'lunch'; did you mean 'launch'\?"),
        ("name: tiny", "name: a/b", r"name must be a word"),
    ],
)
def test_a_broken_chain_is_named(chain, old, new, message):
    edit(chain, old, new)
    with pytest.raises(ConfigError, match=message):
        read_chain(chain)


def test_a_typo_in_a_stage_is_reported_by_the_command(chain):
    edit(chain.parent / "dpo.yaml", "beta", "betta")
    done = subprocess.run(
        [sys.executable, "-m", "posttrain.cli", "run", str(chain)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert "dpo.yaml: unknown key 'betta'; did you mean 'beta'?" in done.stderr
    assert "Traceback" not in done.stderr
