"""On-policy pairs by a verifier and by a reward model, evaluation, and the merged model, on a tiny model."""

import json
import subprocess
import sys

import pytest

from conftest import WORDS, run_recipe, write_jsonl

pytestmark = pytest.mark.usefixtures("forked_processes")

SMALL = [
    "--per_device_train_batch_size", "4", "--learning_rate", "0.02", "--gradient_checkpointing", "false",
    "--adapter.r", "4", "--adapter.alpha", "8",
]  # fmt: skip


@pytest.fixture(scope="module")
def sft(tiny, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "sft"
    run_recipe(
        "sft", "--model_name_or_path", tiny, "--train_file", data, "--num_train_epochs", "40", "--gates.stops", "0",
        "--max_new_tokens", "6", "--output_dir", out, *SMALL,
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def reward(sft, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    rows = [{"prompt": f"{w[1:]} ->", "chosen": f" {w}", "rejected": f" {w[::-1]}"} for w in WORDS]
    pairs = write_jsonl(folder / "pairs.jsonl", rows)
    run_recipe(
        "reward", "--inputs.policy", sft, "--train_file", pairs, "--max_steps", "3", "--output_dir", folder / "run",
        *SMALL,
    )  # fmt: skip
    return folder / "run"


def pairs_of(run_dir):
    rows = []
    for name in ("train", "validation"):
        file = run_dir / "data" / f"{name}.jsonl"
        if file.is_file():
            rows.append([json.loads(line) for line in file.read_text().splitlines()])
    return rows


# Any policy's completions differ in their first letter, so that a judge of letters always finds pairs.
BY_LETTER = ["--verifier", r"regex:[a-m].*", "--num_samples", "16", "--max_new_tokens", "6", "--temperature", "2.0"]


def test_pairs_are_ranked_by_the_verifier_and_split_by_prompt(sft, data, tmp_path):
    run_recipe(
        "sample", "--inputs.policy", sft, "--train_file", data, "--output_dir", tmp_path / "s",
        "--validation_share", "0.3", *BY_LETTER,
    )  # fmt: skip
    train, validation = pairs_of(tmp_path / "s")
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in validation}
    for row in train + validation:
        assert row["chosen"].strip()[0] in "abcdefghijklm"
        assert row["rejected"].strip()[:1] not in tuple("abcdefghijklm") or "\n" in row["rejected"].strip()
    # A resumed run draws what an uninterrupted one drew: the same command elsewhere, and with a chunk taken away.
    run_recipe(
        "sample", "--inputs.policy", sft, "--train_file", data, "--output_dir", tmp_path / "again",
        "--validation_share", "0.3", *BY_LETTER,
    )  # fmt: skip
    assert pairs_of(tmp_path / "again") == [train, validation]


def test_pairs_ranked_by_a_reward_model(sft, reward, data, tmp_path):
    run_recipe(
        "sample", "--inputs.policy", sft, "--inputs.reward", reward, "--train_file", data, "--temperature", "3.0",
        "--max_new_tokens", "6", "--validation_share", "0", "--output_dir", tmp_path / "s",
    )  # fmt: skip
    (rows,) = pairs_of(tmp_path / "s")
    from transformers import AutoTokenizer

    from posttrain.adapters import load_policy
    from posttrain.models.scoring import score
    from posttrain.training.reward import sides_of

    tokenizer = AutoTokenizer.from_pretrained(reward / "adapter")
    sides = sides_of(rows, tokenizer)
    model = load_policy(reward)
    chosen, rejected = (score(model, tokenizer, [pair[i] for pair in sides]) for i in (0, 1))
    assert all(c > r for c, r in zip(chosen, rejected, strict=True))


@pytest.mark.parametrize("judges", [[], ["--verifier", "exact_match", "--inputs.reward", "REWARD"]])
def test_one_judge_is_needed(sft, reward, data, tmp_path, judges):
    judges = [str(reward) if j == "REWARD" else j for j in judges]
    done = run_recipe(
        "sample", "--inputs.policy", sft, "--train_file", data, "--output_dir", tmp_path / "s", *judges, expect=2
    )
    assert "set one judge" in done.stderr


def test_evaluation_equals_what_the_stage_measured(sft, data, tmp_path):
    run_recipe(
        "evaluate", "--inputs.policy", sft, "--test_file", data, "--max_new_tokens", "6", "--output_dir", tmp_path / "e"
    )
    found = json.loads((tmp_path / "e" / "evaluation" / "metrics.json").read_text())
    assert found["rows"] == len(WORDS)
    assert found["greedy_exact_low"] <= found["greedy_exact"] <= found["greedy_exact_high"]
    assert found["greedy_exact"] > 0  # forty epochs on twelve words


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_the_merged_model_is_plain_and_answers_the_same(kind, request, tmp_path):
    import torch
    import transformers

    run_dir = request.getfixturevalue(kind)
    out = tmp_path / "merged"
    command = [sys.executable, "-m", "posttrain.cli", "merge", str(run_dir), str(out)]
    subprocess.run(command, check=True, capture_output=True)
    cls = {"sft": "AutoModelForCausalLM", "reward": "AutoModelForSequenceClassification"}[kind]
    plain = getattr(transformers, cls).from_pretrained(out)
    probe = json.loads((run_dir / "lineage.json").read_text())["metrics"]["probe"]
    if kind == "sft":
        ids = torch.tensor([probe["input_ids"]])
        logprobs = torch.log_softmax(plain(input_ids=ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        assert logprobs.tolist() == pytest.approx(probe["logprobs"], abs=1e-3)
    else:
        scores = [plain(input_ids=torch.tensor([ids])).logits.item() for ids in probe["input_ids"]]
        assert scores == pytest.approx(probe["scores"], abs=1e-3)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert "exists; choose a new folder" in again.stderr


def test_lineage_prints_the_tree(reward, sft):
    done = subprocess.run(
        [sys.executable, "-m", "posttrain.cli", "lineage", str(reward)], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert "[reward]" in lines[0]
    assert any("policy: sft [sft]" in line for line in lines)
    assert "base:" in lines[-1]
