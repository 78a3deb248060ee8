"""PPO as a user runs it, on a tiny model: from an SFT policy and a reward model, on one process and two, killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT, WORDS, run_recipe, write_jsonl
from posttrain.launch import build_command, environment

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_processes")]


SMALL = [
    "--per_device_train_batch_size", "4", "--gradient_checkpointing", "false", "--adapter.r", "4", "--adapter.alpha",
    "8", "--logging_steps", "1", "--gates.stops", "0", "--max_new_tokens", "4",
]  # fmt: skip
PPO = [*SMALL, "--learning_rate", "0.005", "--max_completion_length", "6", "--num_ppo_epochs", "2", "--max_steps", "6"]


@pytest.fixture(scope="module")
def sft(tiny, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "sft"
    run_recipe(
        "sft", "--model_name_or_path", tiny, "--train_file", data, "--test_file", data, "--num_train_epochs", "3",
        "--learning_rate", "0.01", "--output_dir", out, *SMALL,
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def reward(sft, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    rows = [{"prompt": f"{w[1:]} ->", "chosen": f" {w}", "rejected": f" {w[::-1]}"} for w in WORDS]
    run_recipe(
        "reward", "--inputs.policy", sft, "--train_file", write_jsonl(folder / "pairs.jsonl", rows), "--max_steps", "3",
        "--learning_rate", "0.01", "--output_dir", folder / "run", *SMALL[:-4],
    )  # fmt: skip
    return folder / "run"


def lineage(run_dir):
    return json.loads((run_dir / "lineage.json").read_text())


def weights(run_dir):
    from safetensors.torch import load_file

    return load_file(run_dir / "adapter" / "adapter_model.safetensors")


def distance(a, b):
    assert a.keys() == b.keys()
    return max((a[n] - b[n]).abs().max().item() for n in a)


def test_reward_model_and_verifier_on_one_base(sft, reward, data, tmp_path, tiny):
    done = run_recipe(
        "ppo", "--inputs.policy", sft, "--inputs.reward", reward, "--verifier", "exact_match", "--train_file", data,
        "--test_file", data, "--output_dir", tmp_path / "ppo", "--value_mode", "adapter", *PPO,
    )  # fmt: skip
    assert f"reward: the adapter of {reward}, on the policy's base" in done.stdout
    assert (
        "rollout 4 = 4 x 1 accumulated x 1 mini-batches x 1 processes; 2 passes each; 3 rollouts; 6 steps"
        in done.stdout
    )
    found = lineage(tmp_path / "ppo")
    gates = {g["name"]: g["passed"] for g in found["gates"]}
    assert set(gates) == {"takeover", "step0 policy", "step0 reference", "reward reload", "reload", "stops"}
    assert all(gates.values())
    assert found["metrics"]["before"] == lineage(sft)["metrics"]["after"]
    assert {"rewards/exact_match", "objective/kl"} <= found["metrics"].keys()
    assert found["cost"]["trained_parameters"] > 2 * lineage(sft)["cost"]["trained_parameters"]  # the critic's too
    drawn = [json.loads(line) for line in (tmp_path / "ppo" / "completions.jsonl").read_text().splitlines()]
    assert {d["step"] for d in drawn} == {1, 3, 5}  # a rollout is two steps
    parts = (f"rewards/{reward.name}", "rewards/exact_match")
    assert all(d["score"] == pytest.approx(sum(d[p] for p in parts), abs=1e-3) for d in drawn)
    assert "score" in done.stdout

    # What is saved is the policy alone, an ordinary adapter, and the run gives its own answers again.
    from posttrain.adapters import load_policy
    from posttrain.training.gates import probe_logprobs

    assert weights(tmp_path / "ppo").keys() == weights(sft).keys()
    assert distance(weights(tmp_path / "ppo"), weights(sft)) > 1e-3
    probe = found["metrics"]["probe"]
    assert probe_logprobs(load_policy(tmp_path / "ppo"), probe["input_ids"]) == pytest.approx(
        probe["logprobs"], abs=1e-4
    )


def test_a_merged_policy_takes_the_reward_model_as_one_of_its_own(sft, reward, data, tmp_path):
    done = run_recipe(
        "ppo", "--inputs.policy", sft, "--inputs.reward", reward, "--train_file", data, "--adapter.start", "merge",
        "--output_dir", tmp_path / "ppo", *PPO[:-1], "2",
    )  # fmt: skip
    assert "loaded as a separate model: its adapter is not on the weights under the policy's" in done.stdout
    assert all(g["passed"] for g in lineage(tmp_path / "ppo")["gates"])


@pytest.fixture(scope="module")
def one_process(sft, reward, data, tmp_path_factory):
    common = ["--inputs.policy", sft, "--inputs.reward", reward, "--train_file", data, "--bf16", "false", *PPO]
    out = tmp_path_factory.mktemp("runs") / "one"
    run_recipe("ppo", *common, "--output_dir", out)
    return common, out


@pytest.mark.parametrize("config", ["ddp.yaml", "zero3.yaml"])
def test_two_processes_equal_one(one_process, tmp_path, config):
    """From the input policy to a stage that is complete; tests/ppo/test_zero.py has more of ZeRO."""
    common, one = one_process
    file = ROOT / "accelerate_configs" / config
    at = common.index("--per_device_train_batch_size") + 1
    arguments = [*common[:at], "2", *common[at + 1 :], "--output_dir", tmp_path / "two"]
    command = build_command("ppo", list(map(str, arguments)), file)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(file))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 x 1 accumulated x 1 mini-batches x 2 processes" in done.stdout
    assert distance(weights(tmp_path / "two"), weights(one)) < 1e-5
    assert lineage(tmp_path / "two")["world_size"] == 2


def test_kill_9_and_the_same_command_again_equal_the_uninterrupted_run(sft, reward, tmp_path, data):
    """Killed in a rollout, in an update, in a save; the test's reward function shows where the run is."""
    marks = tmp_path / "marks"
    marks.mkdir()
    (tmp_path / "judge.py").write_text(
        "import pathlib, time\n"
        f"marks = pathlib.Path({str(marks)!r})\n"
        "def judge(prompt, completion, row):\n"
        "    number = len(list(marks.iterdir()))\n"
        "    (marks / str(number)).touch()\n"
        "    time.sleep(0.05)\n"
        "    return float(len(completion) % 3)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    arguments = [
        "--inputs.policy", sft, "--inputs.reward", reward, "--verifier", "judge:judge", "--train_file", data,
        "--save_steps", "1", "--value_mode", "adapter", *PPO,
    ]  # fmt: skip
    run_recipe("ppo", *arguments, "--output_dir", tmp_path / "whole", env=env)

    out = tmp_path / "cut"
    command = [sys.executable, str(ROOT / "recipes" / "ppo.py"), *map(str, arguments), "--output_dir", str(out)]

    def judged(completions):
        return lambda: len(list(marks.iterdir())) >= completions

    def being_written(number):
        return lambda: (out / "checkpoints" / f"checkpoint-{number}").is_dir()

    # A rollout is 4 completions, and two steps. The second one begins after step 2.
    moments = {
        "in the first rollout": (judged(2), 0.0),
        "in the first update": (judged(4), 0.08),
        "in the first save": (being_written(1), 0.0),
        "in a later rollout": (judged(6), 0.0),
        "in a later save": (being_written(4), 0.0),
    }
    for name, (moment, later) in moments.items():
        for mark in marks.iterdir():
            mark.unlink()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
        while not moment():
            assert process.poll() is None, name
            time.sleep(0.0005)
        time.sleep(later)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "lineage.json").exists(), name
    run_recipe("ppo", *arguments, "--output_dir", out, env=env)
    assert distance(weights(out), weights(tmp_path / "whole")) == 0
    for file in ("metrics.jsonl", "completions.jsonl"):
        steps = [json.loads(line)["step"] for line in (out / file).read_text().splitlines()]
        assert steps == [json.loads(line)["step"] for line in (tmp_path / "whole" / file).read_text().splitlines()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "set a reward: inputs.reward (a reward stage), verifier"),
        (["--inputs.reward", "SFT"], "is no reward model (task CAUSAL_LM)"),
        (["--verifier", "exact"], "verifier must be exact_match, regex:PATTERN or module:function, got 'exact'"),
        (["--verifier", "exact_match", "--value_mode", "adaptor"], "value_mode must be one of head, adapter, model"),
        (["--verifier", "exact_match", *SMALL, "--num_mini_batches", "4"], "12 prompts, one rollout takes 16; lower"),
        (["--verifier", "exact_match", "--kl_coeff", "1"], "unknown key 'kl_coeff'; did you mean 'kl_coef'?"),
        (["--verifier", "exact_match", "--lam", "1.5"], "lam must be at least 0 and at most 1, got 1.5"),
    ],
)
def test_rewards_and_rows_that_do_not_fit_are_refused(sft, data, tmp_path, arguments, message):
    arguments = [str(sft) if a == "SFT" else a for a in arguments]
    done = run_recipe(
        "ppo", "--inputs.policy", sft, "--train_file", data, "--output_dir", tmp_path / "o", *arguments, expect=2
    )
    assert message in done.stderr
    assert "Traceback" not in done.stderr
