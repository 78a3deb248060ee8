"""The recipes as a user runs them, on a tiny model: SFT, then a reward model and DPO from it, then bad input."""

import json
import shutil

import pytest

from conftest import make_tiny_model, run_recipe, write_jsonl

SMALL = [
    "--per_device_train_batch_size", "4", "--learning_rate", "0.01", "--gradient_checkpointing", "false",
    "--adapter.r", "4", "--adapter.alpha", "8", "--logging_steps", "1",
]  # fmt: skip
POLICY = [*SMALL, "--gates.stops", "0"]


@pytest.fixture(scope="module")
def sft(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"prompt": f"{w[1:]} ->", "completion": f" {w}"} for w in ("receive", "friend", "their", "until")]
    data = write_jsonl(folder / "train.jsonl", rows)
    run_recipe(
        "sft", "--model_name_or_path", tiny, "--train_file", data, "--test_file", data, "--max_new_tokens", "6",
        "--num_train_epochs", "3", "--bf16", "true", "--output_dir", folder / "sft", *POLICY,
    )  # fmt: skip
    return folder / "sft"


def lineage(run_dir):
    return json.loads((run_dir / "lineage.json").read_text())


def test_sft_leaves_an_ordinary_adapter_and_its_lineage(sft, tiny):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found = lineage(sft)
    assert found["kind"] == "adapter"
    assert {g["name"] for g in found["gates"]} == {"reload", "stops"}
    assert set(found["metrics"]["after"]) >= {"greedy_exact", "sampled_exact_low"}
    records = [json.loads(line) for line in (sft / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 3, 3]  # three logs, the end of training, what came of it
    assert records[0]["train/loss"] > 0
    assert records[-1]["final/stops"] == lineage(sft)["metrics"]["stops"]
    assert not (sft / "checkpoints").exists()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), sft / "adapter")
    moved = [p.abs().max().item() for n, p in model.named_parameters() if "lora_B" in n]
    assert moved
    assert max(moved) > 0


# Under bf16 autocast too, a stage must measure and save what the next one will load.
@pytest.mark.parametrize(("start", "test_rows", "bf16"), [("continue", 4, "true"), ("merge", 2, "false")])
def test_dpo_starts_at_the_sft_policy(sft, preferences, tmp_path, start, test_rows, bf16):
    out = tmp_path / "dpo"
    run_recipe(
        "dpo", "--inputs.policy", sft, "--train_file", preferences, "--max_steps", "2", "--max_new_tokens", "6",
        "--test_file", sft.parent / "train.jsonl", "--test_rows", test_rows, "--bf16", bf16,
        "--output_dir", out, "--adapter.start", start, "--train_sampling_strategy", "group_by_length", *POLICY,
    )  # fmt: skip
    found = lineage(out)
    gates = {g["name"]: g for g in found["gates"]}
    assert set(gates) == {
        "takeover", "step0 margin", "step0 loss", "step0 policy", "step0 reference", "reload", "stops",
    }  # fmt: skip
    assert all(g["passed"] for g in gates.values())
    assert found["start"] == start
    assert found["parents"]["policy"]["digest"]

    # What SFT answered is "before" where it answered the same rows, and nowhere else.
    measured = found["metrics"]
    assert ("before" in measured, "change" in measured) == (test_rows == 4, test_rows == 4)
    if test_rows == 4:
        assert measured["before"] == lineage(sft)["metrics"]["after"]
        difference = measured["after"]["sampled_exact"] - measured["before"]["sampled_exact"]
        assert measured["change"]["sampled_exact"] == pytest.approx(difference)
        assert {"answers/before.jsonl", "answers/after.jsonl"} <= set(found["files"])

    # The saved run is the trained policy, through the merge too.
    from posttrain.adapters import load_policy
    from posttrain.training.gates import probe_logprobs

    probe = found["metrics"]["probe"]
    assert probe_logprobs(load_policy(out), probe["input_ids"]) == pytest.approx(probe["logprobs"], abs=1e-4)


@pytest.mark.parametrize("start", ["continue", "merge"])
def test_reward_model_reloads_to_its_scores(sft, preferences, tmp_path, start):
    out = tmp_path / "reward"
    run_recipe(
        "reward", "--inputs.policy", sft, "--train_file", preferences, "--validation_file", preferences,
        "--max_steps", "2", "--output_dir", out, "--adapter.start", start,
        "--train_sampling_strategy", "group_by_length", *SMALL,
    )  # fmt: skip
    found = lineage(out)
    assert found["task"] == "SEQ_CLS"
    assert 0 <= found["metrics"]["held_out_accuracy"] <= 1

    from transformers import AutoTokenizer

    from posttrain.adapters import load_policy
    from posttrain.models.scoring import score

    model, tokenizer = load_policy(out), AutoTokenizer.from_pretrained(out / "adapter")
    probe = found["metrics"]["probe"]
    assert score(model, tokenizer, probe["input_ids"]) == pytest.approx(probe["scores"], abs=1e-4)
    # Against transformers' own pooling, one row at a time: no pad token is involved.
    import torch

    alone = [model(input_ids=torch.tensor([ids])).logits.item() for ids in probe["input_ids"]]
    assert alone == pytest.approx(probe["scores"], abs=1e-4)


def test_a_gate_that_fails_stops_the_stage_and_keeps_everything(tiny, pairs, tmp_path):
    out = tmp_path / "sft"
    arguments = ["--model_name_or_path", tiny, "--train_file", pairs, "--max_steps", "1", "--output_dir", out, *POLICY]
    arguments[arguments.index("--gates.stops") + 1] = "1.0"
    done = run_recipe("sft", *arguments, "--max_new_tokens", "1", expect=2)
    assert "GateError" in done.stderr
    assert "stops: 0, must be at least 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert (out / "checkpoints").is_dir()
    assert not (out / "lineage.json").exists()


def refused(recipe, *arguments, message, out):
    """Exit code 2, one message, no traceback, nothing half-written."""
    done = run_recipe(recipe, *SMALL, *arguments, "--output_dir", out, expect=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(out.glob("adapter*"))
    assert not (out / "lineage.json").exists()


def test_a_model_that_is_not_there(pairs, tmp_path):
    refused(
        "sft", "--model_name_or_path", tmp_path / "none", "--train_file", pairs,
        message="is not a folder", out=tmp_path / "o",
    )  # fmt: skip


def test_a_truncated_base(pairs, tmp_path):
    model = make_tiny_model(tmp_path / "m")
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(
        "sft", "--model_name_or_path", model, "--train_file", pairs, message="model.safetensors is truncated",
        out=tmp_path / "o",
    )  # fmt: skip


def test_rows_that_are_all_too_long(tiny, pairs, tmp_path):
    refused(
        "sft", "--model_name_or_path", tiny, "--train_file", pairs, "--max_length", "2",
        message="100% of the 12 rows are longer than max_length=2", out=tmp_path / "o",
    )  # fmt: skip


def test_an_adapter_of_another_base(sft, preferences, tmp_path):
    other = make_tiny_model(tmp_path / "other", seed=1)
    refused(
        "dpo", "--model_name_or_path", other, "--inputs.policy", sft, "--train_file", preferences,
        message="an adapter fits its own base only", out=tmp_path / "o",
    )  # fmt: skip


def test_a_changed_chat_template(sft, tiny, preferences, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|>!"))
    refused(
        "dpo", "--model_name_or_path", model, "--inputs.policy", sft, "--train_file", preferences,
        message="was trained with another chat template", out=tmp_path / "o",
    )  # fmt: skip


def test_an_altered_adapter(sft, preferences, tmp_path):
    copy = tmp_path / "sft"
    shutil.copytree(sft, copy)
    config = copy / "adapter" / "adapter_config.json"
    config.write_text(config.read_text() + " ")
    refused(
        "dpo", "--inputs.policy", copy, "--train_file", preferences,
        message="adapter_config.json was altered since its stage finished", out=tmp_path / "o",
    )  # fmt: skip


def test_settings_that_a_continued_adapter_cannot_follow(sft, preferences, tmp_path):
    refused(
        "dpo", "--inputs.policy", sft, "--train_file", preferences, "--adapter.r", "8",
        message="adapter.r is 8, but adapter.start: continue", out=tmp_path / "o",
    )  # fmt: skip


def test_a_directory_that_is_taken(sft, pairs, tiny):
    done = run_recipe(
        "sft", "--model_name_or_path", tiny, "--train_file", pairs, "--output_dir", sft, *POLICY, expect=2
    )
    assert "holds another run" in done.stderr
    assert (sft / "lineage.json").is_file()


def test_resume_equals_the_uninterrupted_run(tiny, pairs, tmp_path):
    """Killed after a checkpoint, with a truncated later one as a kill during a save leaves it: the same tensors."""
    from safetensors.torch import load_file

    arguments = [
        "--model_name_or_path", tiny, "--train_file", pairs, "--num_train_epochs", "2", "--save_steps", "2",
        "--adapter.dropout", "0.1", "--save_total_limit", "9", *POLICY,
    ]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_recipe("sft", *arguments, "--output_dir", whole)
    failing = list(map(str, arguments))
    failing[failing.index("--gates.stops") + 1] = "1.0"
    run_recipe("sft", *failing, "--max_new_tokens", "1", "--output_dir", cut, expect=2)
    marker = cut / "stage.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "key": lineage(whole)["key"]}))
    shutil.rmtree(cut / "checkpoints" / "checkpoint-6")
    weights = cut / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    done = run_recipe("sft", *arguments, "--output_dir", cut)
    assert "checkpoint-2" in done.stdout
    a, b = (load_file(d / "adapter" / "adapter_model.safetensors") for d in (whole, cut))
    assert a.keys() == b.keys()
    assert all((a[k] == b[k]).all() for k in a)
    steps = [json.loads(line)["step"] for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
