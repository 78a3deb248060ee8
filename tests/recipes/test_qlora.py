"""QLoRA: a 4-bit base for SFT and DPO, and a merge that dequantises first."""

import json

import pytest

from conftest import WORDS, make_tiny_model, run_recipe, write_jsonl

pytest.importorskip("bitsandbytes", reason="LOUD: bitsandbytes is not installed, QLoRA is not tested")

pytestmark = pytest.mark.slow


SMALL = [
    "--per_device_train_batch_size", "4", "--learning_rate", "0.01", "--gradient_checkpointing", "false",
    "--adapter.r", "4", "--adapter.alpha", "8", "--gates.stops", "0", "--load_in_4bit", "true",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), hidden=64)


@pytest.fixture(scope="module")
def sft(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qlora")
    data = write_jsonl(folder / "t.jsonl", [{"prompt": f"{w[1:]} ->", "completion": f" {w}"} for w in WORDS])
    run_recipe(
        "sft", "--model_name_or_path", base, "--train_file", data, "--max_steps", "4", "--max_new_tokens", "4",
        "--output_dir", folder / "sft", *SMALL,
    )  # fmt: skip
    return folder / "sft"


def test_the_base_is_4_bit_and_the_adapter_is_not(sft):
    import torch

    from posttrain.adapters import load_policy

    model = load_policy(sft)
    assert model.is_loaded_in_4bit
    kinds = {type(m.weight).__name__ for n, m in model.named_modules() if n.endswith("q_proj.base_layer")}
    assert kinds == {"Params4bit"}
    lora = [p for n, p in model.named_parameters() if "lora_" in n]
    assert lora
    assert all(p.dtype in (torch.float32, torch.bfloat16) for p in lora)


def test_dpo_continues_on_4_bit(sft, preferences, tmp_path):
    out = tmp_path / "dpo"
    run_recipe(
        "dpo", "--inputs.policy", sft, "--train_file", preferences, "--max_steps", "2", "--max_new_tokens", "4",
        "--output_dir", out, *SMALL,
    )  # fmt: skip
    gates = {g["name"]: g["passed"] for g in json.loads((out / "lineage.json").read_text())["gates"]}
    assert gates["step0 loss"]
    assert gates["step0 reference"]


def test_merging_into_4_bit_is_refused_for_a_stage(sft, preferences, tmp_path):
    done = run_recipe(
        "dpo", "--inputs.policy", sft, "--train_file", preferences, "--output_dir", tmp_path / "dpo", *SMALL,
        "--adapter.start", "merge", expect=2,
    )  # fmt: skip
    assert "cannot merge into 4-bit weights" in done.stderr


def test_posttrain_merge_dequantises_first(sft, tmp_path):
    """The result has plain weights and answers as the adapter did on its 4-bit base."""
    import torch
    from transformers import AutoModelForCausalLM

    from posttrain.training.merge import merge

    merge(sft, tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    probe = json.loads((sft / "lineage.json").read_text())["metrics"]["probe"]
    ids = torch.tensor([probe["input_ids"]])
    logprobs = torch.log_softmax(plain(input_ids=ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
    assert logprobs.tolist() == pytest.approx(probe["logprobs"], abs=0.02)
