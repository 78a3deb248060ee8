"""FLOP compared with torch's counter; seconds, tokens and rates of a trainer whose phases take known times."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from posttrain.tracking.performance import StepClock, _work_of, describe_work


def counted(model, run):
    with FlopCounterMode(display=False) as counter:
        run(model)
    return counter.get_total_flops()


def llama(tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize(("rows", "length"), [(1, 16), (3, 24)])
def test_a_decoders_forward_pass_costs_what_torch_counts(tiny, rows, length):
    ids = torch.ones(rows, length, dtype=torch.long)
    with torch.no_grad():
        total = counted(llama(tiny), lambda model: model(ids))
    work = _work_of(llama(tiny), passes=1.0)
    tokens = rows * length
    assert work.flops(tokens, tokens, rows) == pytest.approx(total, rel=0.02)
    # Without labels the head is not computed.
    assert work.flops(tokens, 0, rows) == pytest.approx(total - tokens * work.head, rel=0.02)


def test_an_encoders_forward_pass_costs_about_what_torch_counts(tiny_bert):
    from transformers import AutoModelForTokenClassification

    model = AutoModelForTokenClassification.from_pretrained(tiny_bert, num_labels=3, attn_implementation="eager")
    ids = torch.full((2, 20), 5)
    with torch.no_grad():
        total = counted(model, lambda m: m(ids))
    assert _work_of(model, passes=1.0).flops(40, 40, 2) == pytest.approx(total, rel=0.15)  # attention is not counted


def trainer_of(model, **args):
    """The part of a trainer that the clock uses."""
    options = {"bf16": False, "fp16": False, **args}

    def get_batch_samples():
        time.sleep(0.02)

    def compute_loss(model, inputs):
        time.sleep(0.05)

    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, backward=lambda loss: time.sleep(0.08),
        reduce=lambda tensor, reduction: tensor, unwrap_model=lambda m: m,
    )  # fmt: skip
    return SimpleNamespace(
        model=model.train(), args=SimpleNamespace(**options), accelerator=accelerator,
        get_batch_samples=get_batch_samples, compute_loss=compute_loss, get_tp_size=lambda: 1,
    )  # fmt: skip


BATCH = {
    "input_ids": torch.ones(4, 6, dtype=torch.long),
    "attention_mask": torch.tensor([[1] * 6, [1] * 5 + [0], [1] * 6, [1] * 3 + [0] * 3]),
    "labels": torch.tensor([[-100, -100, 1, 1, 1, 1]] * 4),
}


def one_step(trainer, clock, batch=BATCH):
    trainer.get_batch_samples()
    trainer.compute_loss(trainer.model, batch)
    trainer.accelerator.backward(None)
    clock.before_optimizer()
    time.sleep(0.03)
    clock.after_optimizer()
    clock.step()


def test_seconds_by_phase_and_rates_are_measured(tiny):
    trainer = trainer_of(llama(tiny))
    clock = StepClock(trainer)
    clock.start()
    for _ in range(2):
        one_step(trainer, clock)
    time.sleep(0.5)
    clock.skip()  # time of a checkpoint
    found = clock.take({})
    expected = {"time/data": 0.04, "time/forward": 0.1, "time/backward": 0.16, "time/optimizer": 0.06}
    for name, seconds in expected.items():
        assert seconds <= found[name] < seconds + 2, name  # also on a busy machine
    parts = sum(found[n] for n in (*expected, "time/other"))
    assert parts == pytest.approx(2 * found["time/step"])
    seconds = 2 * found["time/step"]
    assert found["perf/tokens_per_s"] == pytest.approx(2 * 20 / seconds)
    assert found["perf/samples_per_s"] == pytest.approx(2 * 4 / seconds)
    flops = clock.work.flops(40, 32, 8)
    assert found["perf/mfu"] == pytest.approx(100 * flops / seconds / clock.peak)
    assert clock.take({}) == {}  # nothing since


def test_pairs_are_two_sequences_and_evaluations_are_not_counted(tiny):
    trainer = trainer_of(llama(tiny))
    clock = StepClock(trainer, pairs=True)
    clock.start()
    one_step(trainer, clock)
    trainer.model.eval()
    trainer.compute_loss(trainer.model, BATCH)  # in an evaluation, so not counted
    own = {"time/generation": 0.02, "time/backward": 0.05, "loss": 1.0}  # the trainer tells them apart
    found = clock.take(own)
    assert found["perf/samples_per_s"] * found["time/step"] == pytest.approx(2)
    assert found["perf/tokens_per_s"] * found["time/step"] == pytest.approx(20)
    named = {**{k: v for k, v in found.items() if k.startswith("time/")}, **own}
    parts = [named[f"time/{p}"] for p in ("data", "forward", "backward", "optimizer", "other", "generation")]
    assert sum(parts) == pytest.approx(found["time/step"], abs=1e-3)


def test_a_batch_of_a_split_model_is_counted_once(tiny):
    """Two pipeline stages see the same batch; the last one computes the loss of each half, and of the whole."""
    trainer = trainer_of(llama(tiny))

    def training_step(model, inputs):
        for _ in range(3):
            trainer.compute_loss(model, inputs)

    trainer.get_tp_size, trainer.training_step = lambda: 2, training_step
    trainer.accelerator.reduce = lambda tensor, reduction: 2 * tensor  # the other stage counts as much
    clock = StepClock(trainer)
    clock.start()
    trainer.training_step(trainer.model, BATCH)
    clock.step()
    found = clock.take({})
    assert found["perf/samples_per_s"] * found["time/step"] == pytest.approx(4)
    assert found["perf/tokens_per_s"] * found["time/step"] == pytest.approx(20)


def test_concatenated_rows_without_padding_are_counted(tiny):
    trainer = trainer_of(llama(tiny))
    clock = StepClock(trainer)
    clock.start()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    one_step(trainer, clock, {"input_ids": torch.ones_like(positions), "position_ids": positions})
    assert clock.counts.tolist() == [9, 0, 3]


@pytest.mark.parametrize(
    ("trained", "args", "passes"),
    [
        ("all", {}, 3), ("some", {}, 2), ("some", {"precompute_ref_log_probs": False}, 3),
        ("some", {"precompute_ref_log_probs": True}, 2),
    ],
)  # fmt: skip
def test_passes_over_the_model_per_token(tiny, trained, args, passes):
    model = llama(tiny)
    if trained == "some":
        model.model.embed_tokens.requires_grad_(False)
    once = _work_of(model, 1.0).flops(100, 50, 10)
    assert describe_work(trainer_of(model, **args)).flops(100, 50, 10) == pytest.approx(passes * once)


def test_passes_for_generation_and_scoring_are_added_to_those_of_training(tiny):
    model = llama(tiny)
    model.model.embed_tokens.requires_grad_(False)
    trainer = trainer_of(model)
    trainer.passes_per_token, trainer.pop_completions = 3 / 4, list
    once = _work_of(model, 1.0).flops(100, 50, 10)
    assert describe_work(trainer).flops(100, 50, 10) == pytest.approx((2 + 3 / 4) * once)


def test_seconds_left_are_estimated_from_the_mean_step(tiny):
    clock = StepClock(trainer_of(llama(tiny)))
    clock.begun = time.perf_counter() - 10
    assert clock.left_s(0, 5) is None
    assert clock.left_s(4, 2) == pytest.approx(5, rel=0.1)
