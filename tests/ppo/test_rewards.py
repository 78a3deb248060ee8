"""A reward adapter on the policy's base, a model of its own, functions: each gives the scores it gives alone."""

import pytest
import torch

from .conftest import PROMPTS


def texts():
    return [f" {w}" for w in ("receive", "weird", "a", "because until")]


def alone(model, tokenizer, prompts, completions):
    """Each row by itself: no padding, so no question of where a score is read."""
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([[*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]])
        base = model.get_base_model()
        hidden = base.model(input_ids=ids).last_hidden_state
        scores.append(base.score(hidden[:, -1]).item())
    return scores


def test_a_reward_adapter_scores_as_the_reward_model_does(make, adapter, reward_adapter):
    folder, model = reward_adapter
    for value_mode in ("head", "adapter"):
        trainer = make(rewards=str(folder), continued=adapter, value_mode=value_mode)
        got = trainer.rewards[0](PROMPTS[:4], texts())
        assert got == pytest.approx(alone(model, trainer.tokenizer, PROMPTS[:4], texts()), abs=1e-5)


def test_a_stand_alone_model_reads_its_own_tokens(make, reward_adapter, tiny):
    from transformers import AutoTokenizer

    _, model = reward_adapter
    own = AutoTokenizer.from_pretrained(tiny)
    own.eos_token = "<|endoftext|>"
    trainer = make(rewards=[model], tokenizer=AutoTokenizer.from_pretrained(tiny))
    trainer.rewards[0].tokenizer = own
    got = trainer.rewards[0](PROMPTS[:4], texts())
    assert got == pytest.approx(alone(model, own, PROMPTS[:4], texts()), abs=1e-5)


def test_the_value_starts_as_the_reward_model(make, adapter, reward_adapter):
    """The critic's first value of the last state is the score that the reward model gives there."""
    trainer = make(rewards=str(reward_adapter[0]), continued=adapter, value_mode="adapter")
    ids = torch.tensor([trainer.tokenizer("eceive -> receive")["input_ids"]])
    mask = torch.ones_like(ids)
    _, _, values = trainer.model(ids, mask, mask[:, -3:])
    assert values[0, -1].item() == pytest.approx(
        trainer.model.reward_scores(ids[:, :-1], mask[:, :-1]).item(), abs=1e-5
    )


def test_a_value_adapter_has_the_shape_of_the_reward_model(make, reward_adapter):
    """And not of the policy, whose rank and scale may be others; dropout is off in all of them."""
    trainer = make(rewards=str(reward_adapter[0]), value_mode="adapter", r=2, dropout=0.5)
    ids = torch.tensor([trainer.tokenizer("eceive -> receive")["input_ids"]])
    mask = torch.ones_like(ids)
    expected = trainer.model.reward_scores(ids[:, :-1], mask[:, :-1]).item()
    for _ in range(2):
        values = trainer.model.train()(ids, mask, mask[:, -3:])[2]
        assert values[0, -1].item() == pytest.approx(expected, abs=1e-5)


def test_functions_get_columns_and_are_weighted(make):
    seen = []

    def first(prompts, completions, completion_ids, answer, **_):
        seen.append((prompts, completions, completion_ids, answer))
        return [1.0] * len(prompts)

    def second(prompts, completions, **_):
        return [None, 2.0, 2.0, 2.0]

    rows = [{"prompt": p, "answer": i} for i, p in enumerate(PROMPTS)]
    trainer = make(rewards=[first, second], rows=rows, reward_weights=[0.5, 10.0], shuffle_dataset=False, max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert (log["rewards/first"], log["rewards/second"]) == (1.0, 2.0)
    assert log["objective/scores"] == pytest.approx((0.5 + 3 * 20.5) / 4)
    prompts, completions, ids, answers = seen[0]
    assert (prompts, answers) == (PROMPTS[:4], [0, 1, 2, 3])
    assert [trainer.tokenizer.decode(i, skip_special_tokens=True) for i in ids] == completions


def test_what_is_no_reward_is_refused(make):
    with pytest.raises(ValueError, match="expected a function, a model or a folder, got 3"):
        make(rewards=3)
    with pytest.raises(ValueError, match="2 numbers for 1 rewards"):
        make(reward_weights=[1.0, 2.0])

    def short(prompts, completions, **_):
        return [1.0]

    with pytest.raises(ValueError, match="gave 1 scores for 4 completions"):
        make(rewards=short).train()


def test_scores_are_shaped(make):
    trainer = make(reward_clip=1.0, missing_eos_penalty=0.5)
    raw, stopped = torch.tensor([5.0, -5.0, 0.3, 0.3]), torch.tensor([True, True, True, False])
    assert trainer._shape_scores(raw, stopped, "train").tolist() == pytest.approx([1.0, -1.0, 0.3, -0.2])
    trainer = make(reward_normalization=True)
    trainer._shape_scores(torch.tensor([0.0, 2.0]), stopped[:2], "train")
    got = trainer._shape_scores(torch.tensor([4.0, 6.0]), stopped[:2], "train")
    assert got.tolist() == pytest.approx([(4 - 3) / 5**0.5, (6 - 3) / 5**0.5])
