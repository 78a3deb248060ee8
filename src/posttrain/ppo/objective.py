"""PPO's arithmetic, as functions of tensors.

Everything per token is (B, T) over completion tokens, right-padded; `mask` (B, T) is 1.0 on a completion's tokens, EOS
included. Losses are returned per token: the caller divides their sum by the number of tokens of the whole optimizer
step, over all its micro-batches and processes.

Schulman et al., 2017 (PPO); 2016 (GAE); Schulman, 2020 (estimators of KL); Ziegler et al., 2019 (KL in the reward, its
controller); Ye et al., 2020 (dual clip); Huang et al., 2024 (details of RLHF with PPO).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def kl_per_token(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimate KL(policy || reference) at each sampled token (B, T), with d = log pi - log pi_ref.

    k1 = d is unbiased; k2 = d^2 / 2 has less variance, and bias; k3 = exp(-d) - 1 + d is unbiased and never negative.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    return d.square() / 2 if estimator == "k2" else torch.expm1(-d) + d


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef * kl_t, plus the completion's score (B,) at its last token: (B, T)."""
    rewards = -kl_coef * kl * mask
    last = mask.sum(1).long() - 1
    return rewards.scatter_add(1, last[:, None], scores.to(rewards.dtype)[:, None])


def generalized_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, delta_t = r_t + gamma V_{t+1} - V_t, V = 0 past the end: (B, T)."""
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    following = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        there = mask[:, t]
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running) * there
        following = values[:, t] * there
        advantages[:, t] = running
    return advantages


def whiten(values: Tensor, mask: Tensor, total: Tensor) -> Tensor:
    """(x - mean) / std over tokens; `total` (3,) holds their count, sum and sum of squares, over all processes."""
    count, first, second = total
    mean = first / count
    variance = (second / count - mean**2).clamp(min=0)
    white: Tensor = (values.double() - mean) * torch.rsqrt(variance + 1e-8) * mask
    return white.to(values.dtype)


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares of the values where `mask` is 1, in float64: (3,)."""
    v = values.double() * mask
    return torch.stack([mask.double().sum(), v.sum(), v.square().sum()])


@dataclass(frozen=True)
class PolicyLoss:
    """Per token (B, T): the loss, the ratio, and 1 where clipping removed the gradient."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> PolicyLoss:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), and not below dual_clip A where A < 0.

    Padding is masked before the exponential: a ratio there could overflow and make the sum infinite.
    """
    ratio = ((logprobs - old_logprobs) * mask).exp()
    free = -advantages * ratio
    held = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(free, held)
    clipped = held > free
    if dual_clip is not None:
        ceiling = -advantages * dual_clip
        too_far = (advantages < 0) & (loss > ceiling)
        loss = torch.where(too_far, ceiling, loss)
        clipped = clipped | too_far
    return PolicyLoss(loss * mask, ratio, clipped.to(mask.dtype) * mask)


@dataclass(frozen=True)
class ValueLoss:
    """Per token (B, T): the loss, and 1 where clipping removed the gradient."""

    loss: Tensor
    clipped: Tensor


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None) -> ValueLoss:
    """max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2; without a clip, (V - R)^2 / 2."""
    free = (values - returns).square()
    if clip is None:
        return ValueLoss(free / 2 * mask, torch.zeros_like(mask))
    held = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    return ValueLoss(torch.maximum(free, held) / 2 * mask, (held > free).to(mask.dtype) * mask)


class KLController:
    """The weight of KL in the reward: fixed, or adapted so that KL nears a target (Ziegler et al., 2019, section 2.2).

    coef <- coef * (1 + clip(KL / target - 1, -0.2, 0.2) * min(1, n / horizon)), after each rollout of n completions.
    """

    def __init__(self, coef: float, target: float | None, horizon: int) -> None:
        if target is not None and coef <= 0:
            raise ValueError(f"kl_coef must be greater than 0 with kl_target, got {coef}: it is multiplied")
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, completions: int) -> None:
        """`kl` is the mean over completions of the sum over tokens, in nats."""
        if self.target is not None:
            error = min(0.2, max(-0.2, kl / self.target - 1))
            self.coef *= 1 + error * min(1.0, completions / self.horizon)


class RunningMoments:
    """Running mean and variance, merged batch by batch (Chan et al., 1983)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0

    def update(self, count: float, total: float, total_squares: float) -> None:
        """Merge a batch by its count, sum and sum of squares."""
        if count == 0:
            return
        mean = total / count
        delta = mean - self.mean
        both = self.count + count
        self.squares += total_squares - count * mean**2 + delta**2 * self.count * count / both
        self.mean += delta * count / both
        self.count = both

    @property
    def std(self) -> float:
        """Population standard deviation; 1 until there is one, so that dividing by it changes nothing."""
        variance = self.squares / self.count if self.count else 0.0
        return variance**0.5 if variance > 0 else 1.0
