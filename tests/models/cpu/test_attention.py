"""Attention with shared key-value heads against attention with copies of them."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.models.cpu.attention import use_grouped_heads

SWITCH = "TRANSFORMERS_SDPA_FORCE_GQA"


def test_shared_heads_give_the_same_outputs_as_copied_ones(monkeypatch):
    """Outputs are equal bit for bit, gradients to the order of a sum; rows are padded on either side."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=48, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.randint(3, 50, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, 6:] = 0, 0
    copies = []

    def run():
        model.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask).logits
        (logits * mask[..., None]).square().sum().backward()
        return logits.detach(), [p.grad.clone() for p in model.parameters()]

    from transformers.integrations import sdpa_attention

    repeat = sdpa_attention.repeat_kv
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda x, n: copies.append(n) or repeat(x, n))
    monkeypatch.setenv(SWITCH, "0")
    assert use_grouped_heads()  # what the environment says stands
    logits, gradients = run()
    assert copies == [3] * 4
    monkeypatch.delenv(SWITCH)
    assert use_grouped_heads()
    shared, shared_gradients = run()
    assert copies == [3] * 4
    assert torch.equal(shared, logits)
    for ours, theirs in zip(shared_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
