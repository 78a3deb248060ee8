"""Intervals against known values; generation against transformers, one prompt at a time."""

import dataclasses
import math

import pytest

from posttrain.intervals import mean_interval, wilson
from posttrain.models.generation import generate
from posttrain.runs.answers import Answer, change, comparable, exact_match, read_answers, write_answers
from posttrain.training.evaluation import answer


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
    answers = answer(net, tokenizer, rows, max_new_tokens=4, batch_size=2, num_samples=0, seed=0)
    assert [a.greedy for a in answers] == texts
    found = exact_match(answers)
    assert (found["greedy_exact"], found["rows"]) == (0.5, 2)
    assert "sampled_exact" not in found


def answers_of(*scores, samples=2):
    """Answers with these scores: 1 is right, 0 wrong, in between a share of right samples."""
    return [
        Answer(f"p{i}", "a", "a" if greedy else "b", True, ["a"] * right + ["b"] * (samples - right))
        for i, (greedy, right) in enumerate(scores)
    ]


def test_the_interval_of_a_change_is_paired():
    """Greedy against the interval from discordant counts (Agresti, 2013, 11.1.1); sampled against a bootstrap."""
    import numpy as np

    # Half of the rows are easy and half are hard: the two intervals overlap, yet one row in twenty got better.
    before = answers_of(*[(i % 2, 2 * (i % 2)) for i in range(400)])
    after = answers_of(*[(i % 2 or i % 20 == 0, 2 * (i % 2) + (i % 20 == 0)) for i in range(400)])
    assert exact_match(before)["greedy_exact_high"] > exact_match(after)["greedy_exact_low"]
    found = change(before, after)
    half = 1.959964 * math.sqrt(20 - 20**2 / 400) / 400  # 20 rows turned right, none wrong
    assert found["greedy_exact"] == pytest.approx(0.05)
    assert found["greedy_exact_low"] == pytest.approx(0.05 - half, rel=2e-3)
    assert found["greedy_exact_high"] == pytest.approx(0.05 + half, rel=2e-3)
    differences = np.array([b.sampled_score - a.sampled_score for a, b in zip(before, after, strict=True)])
    means = np.random.default_rng(0).choice(differences, (20_000, 400)).mean(1)
    assert found["sampled_exact"] == pytest.approx(0.025)
    assert found["sampled_exact_high"] - found["sampled_exact_low"] == pytest.approx(2 * 1.96 * means.std(), rel=0.03)
    worse = change(after, before)
    assert worse["sampled_exact_low"] == pytest.approx(-found["sampled_exact_high"])


def test_answers_compare_on_the_same_rows_only(tmp_path):
    answers = answers_of((1, 2), (0, 1))
    write_answers(tmp_path / "a.jsonl", answers)
    assert read_answers(tmp_path / "a.jsonl") == answers
    answers[0] = dataclasses.replace(answers[0], greedy="a\u2028b")  # no line of JSON ends there
    write_answers(tmp_path / "a.jsonl", answers)
    assert read_answers(tmp_path / "a.jsonl") == answers
    assert comparable(answers, answers_of((0, 0), (0, 0)))
    assert not comparable(answers, answers[:1])
    assert not comparable(answers, answers[::-1])
    assert not comparable(answers, answers_of((1, 1), (0, 0), samples=1))


def test_samples_of_a_prompt_share_only_its_prefill(model):
    """Every sample at a temperature near 0 is the greedy completion, for prompts of different lengths."""
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


def test_a_models_own_repetition_penalty_is_ignored(model):
    net, tokenizer = model
    expected = generate(net, tokenizer, ["friend their until ->"], max_new_tokens=6, batch_size=1)
    own = net.generation_config.repetition_penalty
    net.generation_config.repetition_penalty = 9.0
    try:
        assert generate(net, tokenizer, ["friend their until ->"], max_new_tokens=6, batch_size=1) == expected
    finally:
        net.generation_config.repetition_penalty = own
