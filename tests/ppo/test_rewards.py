"""Reward adapters, separate reward models and functions give the same scores in the trainer as on their own."""

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


def test_two_reward_adapters_on_one_base(make, adapter, reward_adapter, tmp_path):
    """Each keeps its own scores, and the weighted sum is what the policy is trained on."""
    from safetensors.torch import load_file, save_file

    folder, model = reward_adapter
    other = tmp_path / "other" / "adapter"
    other.mkdir(parents=True)
    (other / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({n: -t if ".score." in n else t for n, t in weights.items()}, other / "adapter_model.safetensors")
    trainer = make(
        rewards=[str(folder), str(other)], continued=adapter, value_mode="adapter", reward_weights=[3.0, 1.0],
        max_steps=1,
    )  # fmt: skip
    expected = alone(model, trainer.tokenizer, PROMPTS[:4], texts())
    first, second = (reward(PROMPTS[:4], texts()) for reward in trainer.rewards)
    assert first == pytest.approx(expected, abs=1e-5)
    assert second == pytest.approx([-s for s in expected], abs=1e-5)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["objective/scores"] == pytest.approx(
        3 * log[f"rewards/{trainer.rewards[0].name}"] + log["rewards/other"], abs=1e-5
    )


def test_a_reward_model_that_pools_by_itself(make, tmp_path, tiny):
    """A BERT with a classifier and without a pad token: padding does not change its scores."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.pad_token = None
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, hidden_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    trainer = make(rewards=[model], reward_tokenizers=[tokenizer])
    got = trainer.rewards[0](PROMPTS[:4], texts())
    rows = [[*tokenizer(p + c)["input_ids"], tokenizer.eos_token_id] for p, c in zip(PROMPTS, texts(), strict=False)]
    assert len({len(row) for row in rows}) > 1
    with torch.no_grad():
        assert got == pytest.approx([model(input_ids=torch.tensor([r])).logits.item() for r in rows], abs=1e-5)


def test_a_stand_alone_model_reads_its_own_tokens(make, reward_adapter, tiny):
    from transformers import AutoTokenizer

    _, model = reward_adapter
    own = AutoTokenizer.from_pretrained(tiny)
    own.eos_token = "<|endoftext|>"
    trainer = make(rewards=[model], tokenizer=AutoTokenizer.from_pretrained(tiny), reward_tokenizers=[own])
    got = trainer.rewards[0](PROMPTS[:4], texts())
    assert got == pytest.approx(alone(model, own, PROMPTS[:4], texts()), abs=1e-5)


def test_a_value_adapter_starts_with_the_reward_models_scores(make, adapter, reward_adapter):
    """The critic's first value of the last state is the score that the reward model gives there."""
    trainer = make(rewards=str(reward_adapter[0]), continued=adapter, value_mode="adapter")
    ids = torch.tensor([trainer.tokenizer("eceive -> receive")["input_ids"]])
    mask = torch.ones_like(ids)
    _, _, values = trainer.model(ids, mask, mask[:, -3:])
    assert values[0, -1].item() == pytest.approx(
        trainer.model.reward_scores(ids[:, :-1], mask[:, :-1], "ppo_reward_0").item(), abs=1e-5
    )


def test_a_value_adapter_has_the_shape_of_the_reward_model(make, reward_adapter):
    """And not the policy's, whose rank and scale may differ; dropout is off in all of them."""
    trainer = make(rewards=str(reward_adapter[0]), value_mode="adapter", r=2, dropout=0.5)
    ids = torch.tensor([trainer.tokenizer("eceive -> receive")["input_ids"]])
    mask = torch.ones_like(ids)
    expected = trainer.model.reward_scores(ids[:, :-1], mask[:, :-1], "ppo_reward_0").item()
    for in_one_pass in (True, False):
        trainer.model.in_one_pass = in_one_pass
        values = trainer.model.train()(ids, mask, mask[:, -3:])[2]
        assert values[0, -1].item() == pytest.approx(expected, abs=1e-5)
        assert trainer.model.in_one_pass == in_one_pass


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


def test_invalid_rewards_are_refused(make, tiny):
    from transformers import AutoModelForSequenceClassification

    with pytest.raises(ValueError, match="expected a function, a model or a folder, got 3"):
        make(rewards=3)
    with pytest.raises(ValueError, match="2 numbers for 1 rewards"):
        make(reward_weights=[1.0, 2.0])

    with pytest.raises(ValueError, match="has 2 labels; a reward model has one"):
        make(rewards=[AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=2)])
    with pytest.raises(ValueError, match="2 tokenizers for 1 rewards"):
        make(reward_tokenizers=[None, None])

    def short(prompts, completions, **_):
        return [1.0]

    with pytest.raises(ValueError, match="gave 1 scores for 4 completions"):
        make(rewards=short).train()


def test_scores_are_normalised_clipped_and_penalised(make):
    trainer = make(reward_clip=1.0, missing_eos_penalty=0.5)
    raw, stopped = torch.tensor([5.0, -5.0, 0.3, 0.3]), torch.tensor([True, True, True, False])
    assert trainer.collector.shape_scores(raw, stopped, "train").tolist() == pytest.approx([1.0, -1.0, 0.3, -0.2])
    trainer = make(reward_normalization=True)
    trainer.collector.shape_scores(torch.tensor([0.0, 2.0]), stopped[:2], "train")
    got = trainer.collector.shape_scores(torch.tensor([4.0, 6.0]), stopped[:2], "train")
    assert got.tolist() == pytest.approx([(4 - 3) / 5**0.5, (6 - 3) / 5**0.5])


def test_a_reward_model_without_a_chat_template_is_refused_conversations(make, reward_adapter, tiny):
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tiny)
    own.chat_template = None
    rows = [{"prompt": [{"role": "user", "content": p}]} for p in PROMPTS]
    with pytest.raises(ValueError, match="has no chat template, and prompts are messages"):
        make(rewards=[reward_adapter[1]], rows=rows, reward_tokenizers=[own])
