"""The trainer against plain references, and the properties that PPO must have."""

import copy
import json
import shutil

import pytest
import torch

from posttrain.ppo.actor_critic import POLICY, REFERENCE, positions, trunk_of
from posttrain.ppo.health import Finding
from posttrain.tracking.trainers import DescribesWork, DrawsCompletions, TrainsPolicy, WatchesItself, trained_model

from .conftest import PROMPTS, count_e, tensors

MODES = ["head", "adapter", "model"]


def first_rollout(trainer, number=0):
    size = trainer.args.rollout_size
    rows = [trainer.train_dataset[i] for i in range(number * size, (number + 1) * size)]
    trainer.model.train()
    return trainer._make_rollout(rows, "train")


def close(a, b, tolerance=1e-6):
    assert a.keys() == b.keys()
    return max((a[n] - b[n]).abs().max().item() for n in a) <= tolerance


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("value_mode", MODES)
@pytest.mark.parametrize("start", ["fresh", "continued"])
def test_at_the_first_step_ratio_is_1_and_kl_is_0(make, adapter, value_mode, start, bf16):
    """Ratio 1 and KL 0, also when the reference is a copy of an adapter and not the base, and under autocast."""
    trainer = make(
        value_mode=value_mode, continued=adapter if start == "continued" else None, num_ppo_epochs=1, max_steps=1,
        bf16=bf16,
    )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["policy/ratio"] == pytest.approx(1, abs=1e-6)
    assert log["objective/kl"] == pytest.approx(0, abs=1e-6)
    assert log["policy/approx_kl"] == pytest.approx(0, abs=1e-9)
    assert (trainer.model.reference == REFERENCE) == (start == "continued")


def test_the_reference_of_a_continued_adapter_is_not_the_base(make, adapter):
    trainer = make(continued=adapter)
    rollout = first_rollout(trainer)
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)
    attended = torch.cat([rollout.prompt_mask, rollout.completion_mask], 1)
    model = trainer.model
    ref = model.reference_logprobs(ids, attended, rollout.completion_mask)
    model.reference = None
    base = model.reference_logprobs(ids, attended, rollout.completion_mask)
    assert (ref - base).abs().max() > 0.01
    assert torch.allclose(ref, rollout.old_logprobs, atol=1e-6)


@pytest.mark.parametrize("value_mode", MODES)
def test_only_policy_and_critic_move(make, adapter, reward_adapter, value_mode):
    """Base, reference and reward are bit-identical after several updates; each trained tensor has moved."""
    trainer = make(continued=adapter, rewards=str(reward_adapter[0]), value_mode=value_mode)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trained = set(trainer.model.trainable())
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (name in trained), name
    assert all(f".{POLICY}." in n or trainer.model.is_critic(n) for n in trained)


@pytest.mark.parametrize("micro_batch", [2, 8])
@pytest.mark.parametrize("value_mode", MODES)
def test_values_kept_by_the_rollout_equal_a_forward_pass(make, adapter, value_mode, micro_batch):
    """Log-probabilities, entropies and values of the draws, against one pass over the whole rows. Rows are ragged."""
    trainer = make(
        continued=adapter, value_mode=value_mode, temperature=0.7, per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=8 // micro_batch,
    )  # fmt: skip
    trainer.model.value_head.weight.data.normal_()
    kept = []
    evaluate = trainer.collector.logprobs_and_values
    trainer.collector.logprobs_and_values = lambda *args: kept.append(evaluate(*args)) or kept[-1]
    rollout = first_rollout(trainer)
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)
    attended = torch.cat([rollout.prompt_mask, rollout.completion_mask], 1)
    assert len(set(attended.sum(1).tolist())) > 2
    policy = trainer.model.policy.get_base_model()
    with torch.no_grad():
        logprobs, _, values = trainer.model(ids, attended, rollout.completion_mask)
        logits = policy(input_ids=ids, attention_mask=attended, position_ids=positions(attended)).logits
        reference = trainer.model.reference_logprobs(ids, attended, rollout.completion_mask)
    entropies = torch.distributions.Categorical(logits=logits[:, rollout.prompt_ids.shape[1] - 1 : -1] / 0.7).entropy()
    for then, now in zip(kept[0], (logprobs, entropies, values, reference), strict=True):
        assert torch.allclose(then, now * rollout.completion_mask, atol=2e-5)


def test_train_and_eval_mode_reach_every_module(make):
    """transformers calls `train` for each micro-batch; it visits submodules only if the mode changes."""
    model = make().model
    for mode in (True, True, False, False, True):
        assert model.train(mode) is model
        assert {m.training for m in model.modules()} == {mode}


def test_the_update_is_that_of_a_plain_implementation(make):
    """One optimizer step against PPO's equations written on plain logits, with clipping of the gradient and Adam."""
    trainer = make(
        num_ppo_epochs=1, max_steps=1, temperature=0.7, max_grad_norm=0.5, kl_coef=0.1, shuffle_dataset=False
    )
    trainer.model.value_head.weight.data.normal_(std=0.3)
    plain = copy.deepcopy(trainer.model)
    trainer.train()

    rollout = trainer.rollout
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)
    attended = torch.cat([rollout.prompt_mask, rollout.completion_mask], 1)
    mask, start = rollout.completion_mask.float(), rollout.prompt_ids.shape[1]
    texts = [
        trainer.tokenizer.decode(row[m == 1], skip_special_tokens=True)
        for row, m in zip(rollout.completion_ids, rollout.completion_mask, strict=True)
    ]
    base = plain.policy.get_base_model()
    hidden = trunk_of(plain.policy)(input_ids=ids, attention_mask=attended, position_ids=positions(attended))[0]
    logits = base.lm_head(hidden)[:, start - 1 : -1] / 0.7
    logprobs = torch.log_softmax(logits, -1).gather(-1, ids[:, start:, None])[..., 0] * mask
    assert torch.allclose(logprobs, rollout.old_logprobs, atol=1e-5)
    scores = torch.tensor(count_e(None, texts))
    rewards = torch.zeros_like(mask)
    rewards[torch.arange(4), mask.sum(1).long() - 1] = scores  # KL is zero
    values = plain.value_head(hidden[:, start - 1 : -1])[..., 0] * mask
    before = torch.cat([values.detach(), torch.zeros(4, 1)], 1)
    advantages = torch.zeros_like(mask)
    for t in reversed(range(mask.shape[1])):
        later = advantages[:, t + 1] if t + 1 < mask.shape[1] else 0
        advantages[:, t] = (rewards[:, t] + before[:, t + 1] - before[:, t] + 0.95 * later) * mask[:, t]
    returns = advantages + before[:, :-1]
    there = advantages[mask.bool()]
    white = (advantages - there.mean()) / (there.var(unbiased=False) + 1e-8).sqrt()
    loss = (-(white * (logprobs - logprobs.detach()).exp()) + 0.1 * (values - returns) ** 2 / 2) * mask
    parameters = plain.trainable()
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, eps=1e-5, weight_decay=0.0)
    (loss.sum() / mask.sum()).backward()
    torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)
    optimizer.step()
    assert close(trained_tensors(trainer), {n: p.detach() for n, p in parameters.items()}, 1e-5)


def trained_tensors(trainer):
    return {n: p.detach() for n, p in trainer.accelerator.unwrap_model(trainer.model_wrapped).trainable().items()}


def trained_by(trainer):
    trainer.train()
    return tensors(trainer)


def test_micro_batches_change_nothing(make):
    """Ragged completions in one batch of 4, or four of 1: the token weights are those of the whole step."""
    whole = trained_by(make())
    assert close(trained_by(make(per_device_train_batch_size=1, gradient_accumulation_steps=4)), whole, 2e-5)
    assert close(trained_by(make(per_device_train_batch_size=2, gradient_accumulation_steps=2)), whole, 2e-5)


@pytest.mark.parametrize("value_mode", MODES)
def test_checkpointing_changes_nothing(make, adapter, value_mode):
    trainer = make(value_mode=value_mode, continued=adapter)
    trainer.model.in_one_pass = False  # as under checkpointing: bit for bit
    plain = trained_by(trainer)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    assert close(trained_by(make(value_mode=value_mode, continued=adapter, **options)), plain)


def graded(trainer, rollout):
    """An update's outputs, and the gradients of their sum with other weights each."""
    model = trainer.model.train()
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)
    attended = torch.cat([rollout.prompt_mask, rollout.completion_mask], 1)
    logprobs, _, values = model(ids, attended, rollout.completion_mask)
    weights = torch.linspace(-1, 2, logprobs.numel()).view_as(logprobs)
    (logprobs * weights + values * weights.flip(1)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.trainable().items()}
    model.zero_grad()
    return logprobs.detach(), values.detach(), grads


def test_policy_and_critic_side_by_side_equal_separate_passes(make, adapter, reward_adapter, monkeypatch):
    trainer = make(continued=adapter, rewards=str(reward_adapter[0]), value_mode="adapter")
    rollout, passes = first_rollout(trainer), []
    together = trainer.model._forward_side_by_side
    monkeypatch.setattr(trainer.model, "_forward_side_by_side", lambda *args: passes.append(1) or together(*args))
    beside = graded(trainer, rollout)
    assert len(passes) == 1
    trainer.model.in_one_pass = False
    torch.testing.assert_close(beside, graded(trainer, rollout), rtol=1e-4, atol=1e-5)
    assert len(passes) == 1 and all(grad.any() for grad in beside[2].values())


def test_checkpointing_that_the_policy_brings_changes_nothing(make, adapter, reward_adapter, monkeypatch):
    """Blocks are recomputed with the right adapter also in the first update of a run resumed within a rollout."""
    from transformers import AutoModelForCausalLM

    options = {"continued": adapter, "rewards": str(reward_adapter[0]), "value_mode": "adapter"}
    trainer = make(**options)
    rollout = first_rollout(trainer)
    load = AutoModelForCausalLM.from_pretrained

    def checkpointing(*args, **kwargs):
        model = load(*args, **kwargs)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", checkpointing)
    torch.testing.assert_close(graded(make(**options), rollout), graded(trainer, rollout), rtol=1e-4, atol=1e-5)


def test_adapters_on_other_layers_are_computed_one_role_at_a_time(make, tiny, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    scorer = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1, dtype=torch.float32)
    get_peft_model(scorer, LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")).save_pretrained(tmp_path / "q")
    trainer = make(rewards=str(tmp_path / "q"), value_mode="adapter")
    monkeypatch.setattr(trainer.model, "_forward_side_by_side", None)
    before = tensors(trainer)
    after = trained_by(trainer)
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    assert any("q_proj" in n and "ppo_value" in n for n in moved) and any("mlp" in n and "default" in n for n in moved)


def test_a_model_that_gives_its_layers_other_rows_is_computed_one_role_at_a_time(make, adapter, reward_adapter):
    trainer = make(continued=adapter, rewards=str(reward_adapter[0]), value_mode="adapter")
    rollout = first_rollout(trainer)
    plain = graded(trainer, rollout)
    assert trainer.model.in_one_pass and all(grad.any() for grad in plain[2].values())
    mlp = trunk_of(trainer.model.policy).layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x.flatten(0, 1).flip(0)).flip(0).view_as(x)
    torch.testing.assert_close(plain, graded(trainer, rollout), rtol=1e-4, atol=1e-5)
    assert not trainer.model.in_one_pass


def test_reentrant_checkpointing_with_a_value_adapter_is_refused(make):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="use_reentrant must be false"):
        make(value_mode="adapter", **options).train()


def test_a_pad_token_that_is_eos_changes_nothing(make, tiny):
    from transformers import AutoTokenizer

    distinct = AutoTokenizer.from_pretrained(tiny)
    distinct.pad_token = "<|endoftext|>"
    assert close(trained_by(make(tokenizer=distinct)), trained_by(make()))


def test_steps_are_epochs_times_mini_batches(make):
    trainer = make(
        per_device_train_batch_size=1, gradient_accumulation_steps=2, num_mini_batches=3, num_ppo_epochs=2,
        max_steps=-1, num_train_epochs=1,
    )  # fmt: skip
    trainer.train()
    assert trainer.collector.rollouts == len(PROMPTS) // 6
    assert trainer.state.global_step == trainer.collector.rollouts * 2 * 3


@pytest.mark.parametrize("value_mode", MODES)
def test_a_resumed_run_equals_the_uninterrupted_one(make, tmp_path, value_mode):
    """Wherever the checkpoint is."""
    options = {
        "value_mode": value_mode, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
        "num_mini_batches": 2, "max_steps": 15, "kl_target": 0.05, "reward_normalization": True,
    }  # fmt: skip
    whole = make(save_strategy="steps", save_steps=1, output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    assert whole.state.epoch > 1
    for step in (1, 4, 7, 13):  # in a pass, between rollouts, before a pass, in the second epoch
        again = make(output_dir=str(tmp_path / f"again{step}"), **options)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert close(tensors(again), tensors(whole), 0), step
        assert again.collector.kl.coef == whole.collector.kl.coef
        assert again.health.state_dict() == whole.health.state_dict()


def test_full_fine_tuning_has_separate_models(make):
    trainer = make(peft=False, value_mode="model", learning_rate=1e-3)
    reference = copy.deepcopy(trainer.model.reference_model.state_dict())
    trainer.train()
    for name, tensor in trainer.model.reference_model.state_dict().items():
        assert torch.equal(tensor, reference[name])
    moved = [n for n, p in trainer.model.policy.named_parameters() if not torch.equal(p, reference[n])]
    assert len(moved) == len(reference) - 1  # the head is tied to the embedding


def test_an_adapter_for_values_needs_a_policy_with_one(make):
    with pytest.raises(ValueError, match="value_mode: adapter needs a policy with an adapter"):
        make(peft=False, value_mode="adapter")


def test_too_few_prompts_are_refused(make):
    with pytest.raises(ValueError, match="has 12 prompts, one rollout takes 16"):
        make(per_device_train_batch_size=16)


def test_past_kl_stop_the_rest_of_a_rollout_is_skipped(make):
    trainer = make(kl_stop=1e-12, num_ppo_epochs=4, max_steps=4)
    at = []
    step = trainer.training_step

    def watched(*args, **kwargs):
        result = step(*args, **kwargs)
        at.append(trainer.abandoned)
        return result

    trainer.training_step = watched
    trainer.train()
    one = trained_by(make(num_ppo_epochs=4, max_steps=1))
    assert at == [False, True, True, True]
    assert close(tensors(trainer), one, 0)


@pytest.mark.parametrize("value_mode", MODES)
def test_critic_warmup_leaves_the_policy_unchanged(make, value_mode):
    trainer = make(critic_warmup_steps=4, value_mode=value_mode, weight_decay=0.1)
    before = tensors(trainer)
    trainer.train()
    for name, tensor in tensors(trainer).items():
        if not trainer.model.is_critic(name):
            assert torch.equal(tensor, before[name]), name
    assert trainer.model.value_head.weight.abs().max() > 0


def test_a_large_seed_such_as_a_date_is_accepted(make):
    assert not close(trained_by(make(seed=20261124)), trained_by(make(seed=20261125)))


def test_evaluation_draws_the_same_each_time(make):
    trainer = make()
    rows = trainer.train_dataset
    first, second = trainer.evaluate(rows), trainer.evaluate(rows)
    names = [n for n in first if n.startswith(("eval_objective", "eval_completions", "eval_loss"))]
    assert "eval_objective/scores" in names
    assert {n: first[n] for n in names} == {n: second[n] for n in names}
    assert trainer.rollout is None


def test_evaluation_does_not_change_training(make):
    plain, evaluated = make(), make(eval_strategy="steps", eval_steps=1)
    assert close(trained_by(evaluated), trained_by(plain), 0)
    assert sum("eval_loss" in log for log in evaluated.state.log_history) == 4


def test_what_is_saved_is_the_policy(make, tmp_path):
    from transformers import AutoModelForCausalLM

    trainer = make(peft=False, value_mode="head", learning_rate=1e-3)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(t, saved[n]) for n, t in trainer.model.policy.state_dict().items())


def test_long_prompts_are_refused(make):
    with pytest.raises(ValueError, match=r"12 of 12 prompts are longer than max_prompt_length=1 tokens \(row 1 has"):
        make(max_prompt_length=1)


def test_a_model_that_forbids_tokens_is_refused(make, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "forbids")
    settings = json.loads((tiny / "generation_config.json").read_text()) | {"suppress_tokens": [5]}
    (tmp_path / "forbids" / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"sets suppress_tokens=\[5\]; PPO draws from its plain logits"):
        make(base=tmp_path / "forbids")


def test_some_completions_are_kept_to_be_read(make):
    trainer = make(num_logged_completions=2, max_steps=1)
    trainer.train()
    drawn = trainer.pop_completions()
    assert [d["prompt"] for d in drawn] and len(drawn) == 2
    assert trainer.pop_completions() == []  # each is given out once
    for d in drawn:
        text = d["completion"].replace("<|im_end|>", "")
        assert d["score"] == d["rewards/count_e"] == count_e(None, [text])[0]


def test_completions_findings_and_passes_for_trackers(make):
    trainer = make(num_ppo_epochs=4)
    assert all(isinstance(trainer, what) for what in (WatchesItself, DrawsCompletions, DescribesWork, TrainsPolicy))
    assert trained_model(trainer) is trainer.model.policy
    # Each token is drawn and weighed by the reference, once; a function is no pass over a model.
    assert trainer.passes_per_token == 2 / 4
    trainer.args.bf16 = True  # then a rollout computes the policy again, in the update's precision
    assert trainer.passes_per_token == 3 / 4
    trainer.health.findings.append(Finding("kl runaway", 3, 9.0, 1.0, "Raise kl_coef."))
    assert [finding.name for finding in trainer.findings] == ["kl runaway"]


def test_ppo_raises_the_reward(make):
    """Three seeds learn completions with more of one letter."""
    for seed in (1, 2, 3):
        trainer = make(seed=seed, num_train_epochs=10, max_steps=-1, kl_coef=0.0)
        trainer.train()
        scores = [r["objective/scores"] for r in trainer.state.log_history if "objective/scores" in r]
        assert sum(scores[-5:]) > sum(scores[:5]) + 2.5, seed


def test_metrics_are_numbers_of_the_run(make):
    trainer = make()
    trainer.train()
    json.dumps(trainer.state.log_history)
    log = trainer.state.log_history[0]
    assert log["completions/mean_length"] <= 8
    assert 0 <= log["completions/stopped"] <= 1
    assert log["rewards/count_e"] == log["objective/scores"]
    # Explained variance, of the last rollout, from its tensors.
    rollout, mask = trainer.rollout, trainer.rollout.completion_mask.bool()
    returns, values = (t[mask].double() for t in (rollout.returns, rollout.old_values))
    expected = 1 - (returns - values).var() / returns.var()
    last = [r for r in trainer.state.log_history if "value/explained_variance" in r][-1]
    assert last["value/explained_variance"] == pytest.approx(expected.item(), abs=1e-5)


def test_a_bandit_reaches_the_optimum_of_reward_and_kl(make):
    """One token is drawn and judged: pi*(a) is proportional to pi_ref(a) exp(r(a) / kl_coef)."""

    def odd(prompts, completions, completion_ids, **_):
        return [float(ids[0] % 2 == 1) for ids in completion_ids]

    trainer = make(
        rewards=odd, rows=[{"prompt": "b"}] * 64, per_device_train_batch_size=64, max_completion_length=1,
        max_steps=300, num_ppo_epochs=2, learning_rate=1e-3, peft=False, lr_scheduler_type="linear", kl_coef=0.5,
        whiten_advantages=False, vf_coef=1.0, critic_learning_rate=3e-2, value_clip=None,
    )  # fmt: skip
    trainer.train()
    ids = torch.tensor([trainer.tokenizer("b")["input_ids"]])
    model = trainer.model.eval()
    with torch.no_grad():
        policy = torch.log_softmax(model.policy(input_ids=ids).logits[0, -1], -1)
        reference = torch.log_softmax(model.as_reference(lambda m: m(input_ids=ids)).logits[0, -1], -1)
    best = torch.log_softmax(reference + (torch.arange(len(reference)) % 2 == 1) / 0.5, -1)
    start = (best.exp() * (best - reference)).sum()
    assert start > 0.3  # there was something to learn
    assert (policy.exp() * (policy - best)).sum() < 0.02


def test_a_model_card_for_the_hub_has_the_tags(make, tmp_path):
    trainer = make()
    trainer.create_model_card(model_name="speller", tags="mine")
    text = (tmp_path / "ppo" / "README.md").read_text()
    assert "- mine\n- trl\n- ppo\n" in text and "speller" in text
