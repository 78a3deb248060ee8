"""The recipes as a user starts them, on a split model: takeover, gates, result, lineage."""

import json
import subprocess

import pytest
import torch

from conftest import ROOT, run_here
from posttrain.adapters import load_policy
from posttrain.launch import build_command, environment
from posttrain.runs.lineage import verify
from posttrain.training.gates import probe_logprobs

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("forked_processes")]

COMMON = {
    "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 2, "learning_rate": 0.01,
    "gates.stops": 0, "max_new_tokens": 4, "adapter.r": 4, "adapter.alpha": 8, "bf16": "false",
}  # fmt: skip


def arguments(**values):
    return [part for key, value in {**COMMON, **values}.items() for part in (f"--{key}", str(value))]


def launch(config, recipe, *args):
    """`accelerate launch` with one of our configurations."""
    file = ROOT / "accelerate_configs" / config
    command = list(map(str, build_command(recipe, args, file)))
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment(file))


@pytest.fixture(scope="module")
def policy(tiny, data, tmp_path_factory):
    """An SFT stage on one process."""
    out = tmp_path_factory.mktemp("runs") / "sft"
    run_here("sft", *arguments(model_name_or_path=tiny, train_file=data, output_dir=out))
    return out


def test_dpo_takes_over_a_policy_and_trains_it_in_two_stages(policy, preferences, tmp_path):
    args = {"train_file": preferences, "learning_rate": 1e-3, "inputs.policy": policy}
    split = {"pipeline_parallel_size": 2, "pipeline_micro_batches": 2}
    done = launch("pipeline.yaml", "dpo", *arguments(**args, **split, output_dir=tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 copy on 2 processes (1 data x 2 pipeline x 1 tensor)" in done.stdout
    run_here("dpo", *arguments(**args, output_dir=tmp_path / "one"))

    two, one = verify(tmp_path / "two"), verify(tmp_path / "one")
    assert (two.world_size, two.config["pipeline_parallel_size"]) == (2, 2)
    assert two.key == one.key
    assert {g["name"] for g in two.gates} == {g["name"] for g in one.gates}
    assert two.metrics["rewards/margins"] == pytest.approx(one.metrics["rewards/margins"], abs=1e-5)
    assert two.metrics["probe"]["logprobs"] == pytest.approx(one.metrics["probe"]["logprobs"], abs=1e-4)
    assert list(two.files) == list(one.files)
    for line in map(json.loads, (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()):
        if "perf/samples_per_s" in line:  # the batch is counted once, however many stages see it
            assert line["perf/samples_per_s"] * line["time/step"] == pytest.approx(4)
    model = load_policy(tmp_path / "two")
    torch.testing.assert_close(
        probe_logprobs(model, two.metrics["probe"]["input_ids"]), two.metrics["probe"]["logprobs"], atol=1e-4, rtol=0
    )


def test_a_launch_that_does_not_fit_the_layout_exits_with_the_reason(tiny, data, tmp_path):
    args = arguments(model_name_or_path=tiny, train_file=data, output_dir=tmp_path / "run", tensor_parallel_size=4)
    done = launch("tensor_parallel.yaml", "sft", *args)
    assert done.returncode != 0
    assert "needs a multiple of 4 processes, 2 were launched" in done.stderr
    assert not (tmp_path / "run" / "adapter").exists()
