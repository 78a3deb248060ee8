"""The preallocated cache against transformers' own."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.cache_utils import DynamicLayer

from posttrain.models.cpu import decoding
from posttrain.models.cpu.decoding import LayerWithRoom, cache_with_room


@pytest.mark.parametrize("room", [0, 3, 20])  # none, too little, enough
def test_the_cache_gives_the_same_tokens_as_transformers(tiny, room):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.tensor([[7, 7, 9, 11], [20, 21, 22, 23]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    options = dict(
        attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    expected = model.generate(ids, **options)
    cache = cache_with_room(model, room)
    got = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits))
    assert all(layer.get_seq_length() == 4 + 12 - 1 for layer in cache.layers)


def test_within_its_room_the_cache_copies_nothing():
    layer, plain = LayerWithRoom(5), DynamicLayer()
    first = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 6)  # values of a size of their own
    keys, values = layer.update(*first)
    plain.update(*first)
    at = keys.data_ptr(), values.data_ptr()
    for token in range(7):
        new = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 1, 6)
        keys, values = layer.update(*new)
        for ours, theirs in zip((keys, values), plain.update(*new), strict=True):
            assert torch.equal(ours, theirs)
        assert ((keys.data_ptr(), values.data_ptr()) == at) == (token < 5)


@pytest.mark.parametrize("change", ["batch_select_indices", "reorder_cache"])
def test_selected_rows_of_the_cache_stay_selected(change):
    layer, plain = LayerWithRoom(5), DynamicLayer()
    first, new = (tuple(torch.randn(2, 3, tokens, 8) for _ in range(2)) for tokens in (4, 1))
    for cache in (layer, plain):
        cache.update(*first)
        getattr(cache, change)(torch.tensor([1, 0]))
    for ours, theirs in zip(layer.update(*new), plain.update(*new), strict=True):
        assert torch.equal(ours, theirs)


def test_other_kinds_of_layers_and_caches_stay_as_they_are(monkeypatch):
    config = MistralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=4,
    )  # fmt: skip
    model = MistralForCausalLM(config)
    kinds = [type(layer) for layer in cache_with_room(model, 5).layers]
    assert kinds == [type(layer) for layer in DynamicCache(config=config).layers] != [LayerWithRoom] * 2
    model.generation_config.cache_implementation = "static"
    assert cache_with_room(model, 5) is None
    mamba = MambaConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, state_size=2)
    assert cache_with_room(MambaForCausalLM(mamba), 5) is None
    monkeypatch.setattr(MistralForCausalLM, "_supports_default_dynamic_cache", classmethod(lambda cls: False))
    assert cache_with_room(MistralForCausalLM(config), 5) is None


@pytest.mark.parametrize("rows", [1, 15, 16])
def test_in_slices_gives_the_same_logits(tiny, monkeypatch, rows):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(decoding, "SLICE", 37)  # the last one is smaller
    model = AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.arange(rows)[:, None] % 50
    with torch.no_grad():
        expected = model(ids).logits
        with decoding.in_slices(model):
            assert "forward" in vars(model.lm_head)
            torch.testing.assert_close(model(ids).logits, expected)
    assert "forward" not in vars(model.lm_head)


def test_in_slices_leaves_a_head_as_it_was(tiny):
    """After an error, inside itself, and where its forward was replaced before; a copy keeps its own weights."""
    import copy

    from transformers import AutoModelForCausalLM

    model, ids = AutoModelForCausalLM.from_pretrained(tiny), torch.tensor([[1, 2]])
    with pytest.raises(RuntimeError, match="in the middle"), decoding.in_slices(model):
        raise RuntimeError("in the middle")
    assert "forward" not in vars(model.lm_head)
    with torch.no_grad(), decoding.in_slices(model), decoding.in_slices(model):
        twin = copy.deepcopy(model)
        twin.lm_head.weight = torch.nn.Parameter(torch.zeros_like(twin.lm_head.weight))  # no longer the embedding's
        assert model(ids).logits.any() and not twin(ids).logits.any()
    model.lm_head.forward = lambda x: x[..., :1]
    with decoding.in_slices(model):
        assert model(ids).logits.shape[-1] == 1
    assert model(ids).logits.shape[-1] == 1
