"""Adapters before their first step, and after they are folded into the base."""

import pytest

from posttrain.adapters import fold_for_generation, peft_config
from posttrain.config.sections import AdapterSettings
from posttrain.errors import ConfigError
from posttrain.training.gates import probe_logprobs

IDS = [5, 9, 17, 4, 8]


@pytest.fixture
def base(tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_a_fresh_adapter_is_the_identity(method, base):
    """B starts at zero: the outputs are the base's."""
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    expected = probe_logprobs(base, IDS)
    settings = AdapterSettings(method=method, r=4)
    model = get_peft_model(base, peft_config(settings, task="CAUSAL_LM", base="x"))
    assert all((p == 0).all() for n, p in model.named_parameters() if "lora_B" in n)
    assert probe_logprobs(model, IDS) == pytest.approx(expected, abs=1e-5)
    scaling = {m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)}
    assert scaling == {16.0 if method == "rslora" else 8.0}  # alpha / sqrt(r), alpha / r
    assert any("magnitude" in n for n, _ in model.named_parameters()) == (method == "dora")


def test_folding_keeps_the_outputs(base):
    from peft import get_peft_model

    settings = peft_config(AdapterSettings(r=4), task="CAUSAL_LM", base="x")
    settings.init_lora_weights = False  # B is not zero, so that there is something to fold
    model = get_peft_model(base, settings)
    expected = probe_logprobs(model, IDS)
    fold_for_generation(model)
    assert any(getattr(m, "merged", False) for m in model.modules())
    assert probe_logprobs(model, IDS) == pytest.approx(expected, abs=1e-4)


def test_bf16_weights_are_not_folded(base):
    import torch
    from peft import get_peft_model

    model = get_peft_model(base.to(torch.bfloat16), peft_config(AdapterSettings(r=4), task="CAUSAL_LM", base="x"))
    fold_for_generation(model)
    assert not any(getattr(m, "merged", False) for m in model.modules())


def test_no_adapter_is_full_fine_tuning():
    assert peft_config(AdapterSettings(method="none"), task="CAUSAL_LM", base="x") is None


def test_target_modules_must_be_names():
    with pytest.raises(ConfigError, match=r"adapter.target_modules must be 'all-linear' or a list"):
        peft_config(AdapterSettings(target_modules=3), task="CAUSAL_LM", base="x")
