"""Intervals against known values; generation against transformers, one prompt at a time."""

import pytest

from posttrain.evaluation import exact_match, generate, mean_interval, wilson


def test_wilson_is_the_published_interval():
    # Newcombe, 1998, table I: 81 of 263, and 0 of 20.
    assert (wilson(81, 263).low, wilson(81, 263).high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert (wilson(0, 20).low, wilson(0, 20).high) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_mean_interval_covers_the_mean_at_its_rate():
    import random

    rng = random.Random(0)
    hits = 0
    for _ in range(1000):
        share = mean_interval([rng.random() < 0.3 for _ in range(200)])
        hits += share.low <= 0.3 <= share.high
    assert 925 <= hits <= 975  # 95% of 1,000, within 3.6 standard errors


@pytest.fixture(scope="module")
def model(tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)


def test_greedy_batches_equal_single_prompts(model):
    import torch

    net, tokenizer = model
    prompts = ["eceive ->", "a", "friend their until ->", "x y"]
    batched = generate(net, tokenizer, prompts, max_new_tokens=5, batch_size=3)
    for prompt, got in zip(prompts, batched, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = net.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        new = out[0, ids.shape[1] :].tolist()
        text = tokenizer.decode(new, skip_special_tokens=True)
        assert got[0].text == text
        assert got[0].stopped == (tokenizer.eos_token_id in new)


def test_draws_are_seeded_and_leave_the_global_state_alone(model):
    import torch

    options = {"max_new_tokens": 5, "batch_size": 8, "temperatures": [1.0] * 4}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = generate(*model, ["a", "b"], seed=1, **options)
    assert torch.equal(torch.rand(1), expected)
    assert generate(*model, ["a", "b"], seed=1, **options) == first
    assert generate(*model, ["a", "b"], seed=2, **options) != first
    assert [len(cs) for cs in first] == [4, 4]


def test_exact_match_counts_what_is_right(model):
    """Rows whose answer is the model's own greedy one, and as many that are wrong."""
    net, tokenizer = model
    prompts = ["eceive ->", "riend ->"]
    texts = [c[0].text for c in generate(net, tokenizer, prompts, max_new_tokens=4, batch_size=2)]
    rows = [
        {"prompt": prompts[0], "completion": texts[0]},
        {"prompt": prompts[1], "completion": "certainly not"},
    ]
    found = exact_match(net, tokenizer, rows, max_new_tokens=4, batch_size=2, num_samples=0, seed=0)
    assert found["greedy_exact"] == 0.5
    assert found["rows"] == 2


def test_samples_share_their_prompts_work_and_nothing_else(model):
    """Nearly greedy draws from prompts of different lengths are the greedy completions, each of the samples."""
    prompts = ["eceive ->", "a", "friend their until ->", "x y", "eird ->"]
    greedy = generate(*model, prompts, max_new_tokens=5, batch_size=2)
    drawn = generate(*model, prompts, max_new_tokens=5, batch_size=6, temperatures=[0.0, 1e-4, 1e-4], seed=7)
    assert [[c.text for c in cs] for cs in drawn] == [[cs[0].text] * 3 for cs in greedy]


def test_draws_have_the_models_probabilities(model):
    """4,000 first tokens against softmax of the logits: total variation within sampling noise."""
    import torch

    net, tokenizer = model
    prompt = "eparate ->"
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    expected = torch.softmax(net(input_ids=ids).logits[0, -1], -1)
    drawn = generate(
        net, tokenizer, [prompt], max_new_tokens=1, batch_size=4000, temperatures=[1.0] * 4000, seed=5
    )  # fmt: skip
    counts = torch.zeros(len(expected))
    for completion in drawn[0]:
        token = tokenizer(completion.text)["input_ids"][0] if completion.text else tokenizer.eos_token_id
        counts[token] += 1
    top = expected.argmax()
    error = (expected[top] * (1 - expected[top]) / 4000).sqrt()
    assert abs(counts[top] / 4000 - expected[top]) < 4 * error


def test_top_p_never_leaves_the_nucleus(model):
    import torch

    net, tokenizer = model
    prompt = "eparate ->"
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    probabilities, tokens = torch.softmax(net(input_ids=ids).logits[0, -1], -1).sort(descending=True)
    nucleus = set(tokens[: int((probabilities.cumsum(0) < 0.6).sum()) + 1].tolist())
    drawn = generate(net, tokenizer, [prompt], max_new_tokens=1, batch_size=500, temperatures=[1.0] * 500, top_p=0.6)
    found = {tokenizer(c.text)["input_ids"][0] if c.text else tokenizer.eos_token_id for c in drawn[0]}
    assert found <= nucleus


def test_a_models_own_generation_settings_are_left_aside(model):
    net, tokenizer = model
    expected = generate(net, tokenizer, ["friend their until ->"], max_new_tokens=6, batch_size=1)
    own = net.generation_config.repetition_penalty
    net.generation_config.repetition_penalty = 9.0
    try:
        assert generate(net, tokenizer, ["friend their until ->"], max_new_tokens=6, batch_size=1) == expected
    finally:
        net.generation_config.repetition_penalty = own
