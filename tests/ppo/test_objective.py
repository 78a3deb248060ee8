"""PPO's arithmetic against its definitions, written out in Python loops, and against known properties."""

import math

import pytest
import torch

from posttrain.ppo import objective

LENGTHS = [1, 4, 7, 2]


@pytest.fixture
def mask():
    return torch.tensor([[1.0] * n + [0.0] * (7 - n) for n in LENGTHS])


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*(shape or (4, 7)), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_are_the_double_sum_on_ragged_rows(draw, mask, gamma, lam):
    rewards, values = draw(), draw()
    got = objective.generalized_advantages(rewards, values, mask, gamma, lam)
    for row, n in enumerate(LENGTHS):
        r, v = rewards[row].tolist(), [*values[row, :n].tolist(), 0.0]
        for t in range(n):
            expected = sum((gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, n))
            assert got[row, t].item() == pytest.approx(expected)
        assert not got[row, n:].any()


def test_advantages_ignore_what_padding_holds(draw, mask):
    rewards, values = draw() * mask, draw() * mask
    noise = 1e6 * (1 - mask)
    clean = objective.generalized_advantages(rewards, values, mask, 1.0, 0.95)
    assert torch.equal(objective.generalized_advantages(rewards + noise, values + noise, mask, 1.0, 0.95), clean)


def test_with_lambda_one_an_advantage_is_return_minus_value(draw, mask):
    rewards, values = draw() * mask, draw() * mask
    got = objective.generalized_advantages(rewards, values, mask, 1.0, 1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    assert torch.allclose(got, (to_go - values) * mask)


def test_the_score_lands_on_the_last_token(mask):
    scores, kl = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.full((4, 7), 0.5)
    rewards = objective.token_rewards(scores, kl, mask, 0.1)
    for row, n in enumerate(LENGTHS):
        assert rewards[row, : n - 1].tolist() == pytest.approx([-0.05] * (n - 1))
        assert rewards[row, n - 1] == pytest.approx(scores[row].item() - 0.05)
        assert not rewards[row, n:].any()


def test_estimators_of_kl_agree_with_the_exact_one():
    generator = torch.Generator().manual_seed(1)
    p, q = (torch.log_softmax(0.3 * torch.randn(6, generator=generator, dtype=torch.float64), 0) for _ in range(2))
    exact = (p.exp() * (p - q)).sum()
    for name in ("k1", "k3"):
        # The expectation over the policy's own draws, summed exactly.
        assert (p.exp() * objective.kl_per_token(p, q, name)).sum().item() == pytest.approx(exact.item())
    assert (objective.kl_per_token(p, q, "k3") >= 0).all()
    assert (p.exp() * objective.kl_per_token(p, q, "k2")).sum().item() == pytest.approx(exact.item(), rel=0.3)


def test_the_policy_loss_is_the_clipped_minimum(draw, mask):
    new, old, advantages = 0.5 * draw(), 0.5 * draw(), draw()
    got = objective.policy_loss(new, old, advantages, mask, 0.2, 0.3, None)
    for row, n in enumerate(LENGTHS):
        for t in range(n):
            ratio, a = math.exp(new[row, t] - old[row, t]), advantages[row, t].item()
            cut = min(max(ratio, 0.8), 1.3)
            assert got.loss[row, t].item() == pytest.approx(-min(ratio * a, cut * a))
            assert bool(got.clipped[row, t]) == (cut * a < ratio * a)
        assert not got.loss[row, n:].any()


def test_a_clipped_token_has_no_gradient(draw, mask):
    new = (0.5 * draw()).requires_grad_()
    got = objective.policy_loss(new, 0.5 * draw(), draw(), mask, 0.2, 0.2, 3.0)
    got.loss.sum().backward()
    assert torch.equal(new.grad != 0, (got.clipped == 0) & (mask == 1))


def test_the_dual_clip_bounds_the_loss_of_a_bad_action():
    one = torch.ones(1, 1)
    free = objective.policy_loss(2.0 * one, 0 * one, -one, one, 0.2, 0.2, None)
    held = objective.policy_loss(2.0 * one, 0 * one, -one, one, 0.2, 0.2, 3.0)
    assert free.loss.item() == pytest.approx(math.exp(2))
    assert held.loss.item() == pytest.approx(3)


def test_an_overflow_in_padding_stays_there(mask):
    new = torch.where(mask == 1, 0.0, 1e4)
    assert torch.isfinite(objective.policy_loss(new, 0 * new, new, mask, 0.2, 0.2, None).loss).all()


def test_the_value_loss_takes_the_worse_of_two(draw, mask):
    values, old, returns = draw(), draw(), draw()
    got = objective.value_loss(values, old, returns, mask, 0.2)
    for row, n in enumerate(LENGTHS):
        for t in range(n):
            v, o, r = (x[row, t].item() for x in (values, old, returns))
            cut = o + min(max(v - o, -0.2), 0.2)
            assert got.loss[row, t].item() == pytest.approx(max((v - r) ** 2, (cut - r) ** 2) / 2)
    assert torch.equal(objective.value_loss(values, old, returns, mask, None).loss, (values - returns) ** 2 / 2 * mask)


def test_whitening_over_two_processes_is_whitening_of_both(draw, mask):
    values = 3 + 2 * draw()
    halves = [(values[:2], mask[:2]), (values[2:], mask[2:])]
    total = sum(objective.moments(v, m) for v, m in halves)
    whole = objective.whiten(values, mask, objective.moments(values, mask))
    parts = torch.cat([objective.whiten(v, m, total) for v, m in halves])
    assert torch.allclose(whole, parts)
    there = whole[mask.bool()]
    assert there.mean().item() == pytest.approx(0, abs=1e-7)
    assert there.std(unbiased=False).item() == pytest.approx(1, abs=1e-7)


def test_whitening_keeps_small_differences_on_a_large_constant(draw, mask):
    values = (1000 + 0.05 * draw()).float()
    white = objective.whiten(values, mask, objective.moments(values, mask))[mask.bool()]
    assert white.std(unbiased=False).item() == pytest.approx(1, abs=1e-3)


def test_the_weight_of_kl_moves_towards_its_target():
    controller = objective.KLController(0.1, target=6.0, horizon=1000)
    controller.update(12.0, 100)  # twice the target: the error is cut to 0.2
    assert controller.coef == pytest.approx(0.1 * (1 + 0.2 * 100 / 1000))
    controller.update(5.7, 100)
    assert controller.coef == pytest.approx(0.102 * (1 - 0.05 * 100 / 1000))
    small = objective.KLController(0.1, target=6.0, horizon=1)
    small.update(0.0, 100)
    assert small.coef == pytest.approx(0.08)  # never past zero, however short the horizon
    fixed = objective.KLController(0.1, target=None, horizon=1000)
    fixed.update(100.0, 100)
    assert fixed.coef == 0.1


def test_running_moments_are_those_of_everything_seen(draw):
    seen = [draw(5), draw(1) + 4, draw(9) * 3]
    moments = objective.RunningMoments()
    assert moments.std == 1
    for batch in seen:
        moments.update(*objective.moments(batch, torch.ones_like(batch)).tolist())
    everything = torch.cat(seen)
    assert moments.mean == pytest.approx(everything.mean().item())
    assert moments.std == pytest.approx(everything.std(unbiased=False).item())
