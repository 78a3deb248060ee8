"""AdaLoRA's penalty is in every recipe's loss, once."""

import json

import pytest

from conftest import SENTENCES, run_here, write_conll
from posttrain.adapters import adalora
from posttrain.errors import ConfigError

ARGUMENTS = {
    "sft": ["--gates.stops", 0, "--gradient_checkpointing", "false"],
    "reward": [],
    "dpo": ["--gates.stops", 0],
    "ner": ["--eval_strategy", "no", "--max_length", 64, "--window_overlap", 8],
}


def first_loss(recipe: str, method: str, model, rows, out, accumulated: int) -> float:
    run_here(
        recipe, "--model_name_or_path", model, "--train_file", rows, "--output_dir", out, "--bf16", "false",
        "--max_steps", 2, "--logging_steps", 1, "--per_device_train_batch_size", 4 // accumulated,
        "--gradient_accumulation_steps", accumulated, "--adapter.method", method,
        "--adapter.r", 4, "--learning_rate", 1e-9, *ARGUMENTS[recipe],
    )  # fmt: skip
    logs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return next(record["train/loss"] for record in logs if "train/loss" in record)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("recipe", ARGUMENTS)
def test_the_penalty_is_in_the_loss_once(
    recipe, accumulated, tiny, tiny_bert, pairs, preferences, tmp_path, monkeypatch
):
    """A fresh adapter changes no output, so that the first loss is LoRA's and the penalty, weighed with PEFT's 0.5."""
    rows = {"sft": pairs, "ner": write_conll(tmp_path / "a.conll", SENTENCES)}.get(recipe, preferences)
    model = tiny_bert if recipe == "ner" else tiny
    plain = first_loss(recipe, "lora", model, rows, tmp_path / "lora", accumulated)
    found = []
    shares = adalora.allocation
    monkeypatch.setattr(
        "posttrain.training.callbacks.allocation",
        lambda trainer: (found.append(penalty_of(trainer.model)), shares(trainer))[1],
    )
    with_penalty = first_loss(recipe, "adalora", model, rows, tmp_path / "adalora", accumulated)
    assert with_penalty - plain == pytest.approx(0.5 * found[0], abs=2e-3)
    assert found[0] > 1


def penalty_of(model) -> float:
    """By hand: the mean distance of each factor's Gram matrix from the identity."""
    import torch

    distances = []
    for module in model.modules():
        if hasattr(module, "lora_E") and "default" in module.lora_A:
            for factor in (module.lora_A["default"], module.lora_B["default"].T):
                gram = torch.einsum("ik,jk->ij", factor, factor)
                distances.append((gram - torch.eye(len(gram))).square().sum().sqrt())
    return sum(distances).item() / len(distances)


def test_the_penalty_matches_peft(tiny):
    import torch
    from peft import AdaLoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = AdaLoraConfig(task_type="CAUSAL_LM", total_step=10, init_r=6, target_r=4, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    ids = torch.tensor([[5, 6, 7, 8]])
    losses = []
    for weight in (0.5, 0.0):
        model.peft_config["default"].orth_reg_weight = weight
        losses.append(model(input_ids=ids, labels=ids).loss)
    assert float(losses[0] - losses[1]) == pytest.approx(0.5 * float(adalora.distance_from_orthogonal(model)), rel=1e-4)


def test_a_single_step_is_refused(tiny, pairs, tmp_path):
    """PEFT would raise a KeyError: ranks are allocated by the importance scores of the step before."""
    with pytest.raises(ConfigError, match="has one step"):
        run_here(
            "sft", "--model_name_or_path", tiny, "--train_file", pairs, "--output_dir", tmp_path / "run",
            "--max_steps", 1, "--adapter.method", "adalora", "--gradient_checkpointing", "false",
        )  # fmt: skip
