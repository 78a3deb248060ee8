"""Sampling against torch's own distributions, and settings of a model that must not change it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.models.generation import Draw, generate_ids


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_a_draw_keeps_its_logprob_and_entropy(temperature):
    """Also where some tokens have probability 0."""
    torch.manual_seed(0)
    logits = torch.randn(6, 11) * 3
    logits[:, 4], logits[2, 5:] = -torch.inf, torch.finfo(torch.float32).min
    numbers = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.9, 0.999])
    draw = Draw([temperature] * 6, 1.0, lambda place: numbers)
    draw.keep()
    chosen = draw(None, logits).argmax(-1)
    expected = torch.distributions.Categorical(logits=logits / temperature)
    cumulative = expected.probs.cumsum(1)
    assert torch.equal(chosen, (cumulative <= numbers[:, None]).sum(1))
    torch.testing.assert_close(draw.logprobs[0], expected.log_prob(chosen))
    torch.testing.assert_close(draw.entropies[0], torch.special.entr(expected.probs).sum(1))


def test_a_model_that_was_trained_without_a_cache_draws_the_same(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    drawn = []
    for cached in (True, False):
        model = AutoModelForCausalLM.from_pretrained(tiny).eval()
        model.config.use_cache = model.generation_config.use_cache = cached
        torch.manual_seed(0)
        drawn.append(
            generate_ids(
                model, tokenizer, torch.tensor([[7, 8, 9], [20, 21, 22]]), torch.tensor([[0, 1, 1], [1, 1, 1]]),
                temperature=1.0, max_new_tokens=9, uniforms=torch.rand(2, 9),
            )
        )  # fmt: skip
    assert drawn[0].ids == drawn[1].ids
    torch.testing.assert_close(drawn[0].logprobs, drawn[1].logprobs)
