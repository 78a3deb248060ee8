"""Each gate passes what is right and catches what is wrong."""

import math

import pytest

from posttrain.errors import GateError
from posttrain.training import gates


def test_require_names_every_failed_number(tmp_path):
    bad = [gates.stops(0.2, 0.5), gates.accuracy(0.6, 0.75), gates.stops(1.0, 0.5)]
    with pytest.raises(GateError) as caught:
        gates.require(bad, tmp_path)
    text = str(caught.value)
    assert "stops: 0.2, must be at least 0.5" in text
    assert "accuracy: 0.6, must be at least 0.75" in text
    assert text.count("must be") == 2


def test_the_tolerance_of_same_outputs_depends_on_the_format():
    assert gates.same_outputs("x", [1.0], [1.0005], dtype="float32").passed
    assert not gates.same_outputs("x", [1.0], [1.01], dtype="float32").passed
    assert gates.same_outputs("x", [1.0], [1.01], dtype="bfloat16").passed
    with pytest.raises(GateError):
        gates.same_outputs("x", [1.0], [1.0, 2.0], dtype="float32")


def test_probe_logprobs_match_the_cross_entropy_loss(tiny):
    """Oracle: transformers' own cross entropy over the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    ids = [5, 9, 17, 4, 8]
    loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert -sum(gates.probe_logprobs(model, ids)) / 4 == pytest.approx(loss, abs=1e-5)


@pytest.fixture
def dpo(tiny, preferences, tmp_path):
    import torch
    from datasets import load_dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False),
    )
    args = DPOConfig(str(tmp_path / "o"), bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none")
    dataset = load_dataset("json", data_files=str(preferences), split="train", cache_dir=str(tmp_path / "cache"))
    return DPOTrainer(model, args=args, train_dataset=dataset, processing_class=AutoTokenizer.from_pretrained(tiny))


def test_dpo_step_zero_is_ln_2(dpo):
    found = {g.name: g for g in gates.dpo_step_zero(dpo, beta_loss=True)}
    assert found["step0 loss"].value == pytest.approx(math.log(2), abs=1e-5)
    assert all(g.passed for g in found.values())
    assert not any(dpo._metrics["train"].values())


def test_dpo_step_zero_catches_a_wrong_reference(dpo):
    """The reference's adapter is emptied, as when the base is taken for the SFT policy."""
    import torch

    with torch.no_grad():
        for name, parameter in dpo.model.named_parameters():
            if ".ref." in name:
                parameter.zero_()
    found = {g.name: g for g in gates.dpo_step_zero(dpo, beta_loss=True)}
    assert not found["step0 margin"].passed


def test_a_missing_eos_label_is_caught(tiny, pairs, tmp_path):
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    dataset = load_dataset("json", data_files=str(pairs), split="train", cache_dir=str(tmp_path / "cache"))
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny),
        args=SFTConfig(str(tmp_path / "o"), bf16=False, use_cpu=True, report_to="none"),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    assert gates.eos_is_learned(trainer, tokenizer).passed
    collate = trainer.data_collator

    def masked(rows):
        batch = collate(rows)
        batch["labels"][batch["labels"] == tokenizer.pad_token_id] = -100  # the usual mistake
        return batch

    trainer.data_collator = masked
    assert not gates.eos_is_learned(trainer, tokenizer).passed
