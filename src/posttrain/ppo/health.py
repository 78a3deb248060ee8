"""Failures of PPO that show in its metrics before the reward drops, each reported when it begins.

    not finite           KL or entropy is NaN or infinite
    kl runaway           KL to the reference above KL_PER_TOKEN nats per token, or above four times kl_target
    entropy collapse     entropy below a tenth of that at the start
    length growth        completions twice as long as at the start, and fewer than half as many end by EOS
    dead critic          explained variance of the returns at most 0 for PATIENCE rollouts
    reward saturation    all completions of a rollout got the same score, for PATIENCE rollouts

`on_unhealthy: warn` continues, `stop` ends training, `rollback` ends it with the weights of the last healthy rollout.
"""

import math
import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from ..distributed.deepspeed import whole

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from .actor_critic import ActorCritic

KL_PER_TOKEN = 1.0
PATIENCE = 5


@dataclass(frozen=True)
class Finding:
    """One failure: its name, the step at which it began, the number and its limit, and what to try."""

    name: str
    step: int
    value: float
    limit: float
    advice: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.name} ({self.value:.4g}, limit {self.limit:.4g}). {self.advice}"


class HealthWatch(TrainerCallback):  # type: ignore[misc]
    """Checks each rollout of `PPOTrainer`. A finding is reported when it begins, and again only if it comes back."""

    def __init__(self, on_unhealthy: str, kl_target: float | None) -> None:
        self.on_unhealthy, self.kl_target = on_unhealthy, kl_target
        self.findings: list[Finding] = []
        self.wrong: set[str] = set()
        self.first: dict[str, float] = {}
        self.explained: deque[float] = deque(maxlen=PATIENCE)
        self.spread: deque[float] = deque(maxlen=PATIENCE)
        self.healthy: dict[str, torch.Tensor] = {}
        self.end = False

    def to_list(self) -> list[dict[str, Any]]:
        return [asdict(f) for f in self.findings]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, but for the weights of the last healthy rollout, which have their own file."""
        return {
            "findings": self.to_list(), "wrong": sorted(self.wrong), "first": self.first,
            "explained": list(self.explained), "spread": list(self.spread), "end": self.end,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.findings = [Finding(**f) for f in state["findings"]]
        self.wrong, self.first, self.end = set(state["wrong"]), dict(state["first"]), state["end"]
        self.explained.extend(state["explained"])
        self.spread.extend(state["spread"])

    def look(self, step: int, metrics: Mapping[str, float], model: "ActorCritic") -> None:
        """Check a rollout's metrics. `model` must still be the one that sampled it."""
        found = self.examine(step, metrics)
        begun = [f for f in found if f.name not in self.wrong]
        self.wrong = {f.name for f in found}
        self.findings += begun
        for finding in begun:
            warnings.warn(str(finding), stacklevel=2)
        if self.on_unhealthy == "rollback" and not found:
            self.healthy = {n: p.detach().clone() for n, p in model.trainable().items()}
        if begun and self.on_unhealthy == "rollback" and not self.healthy:
            warnings.warn("no rollout was healthy yet: there is nothing to roll back to", stacklevel=2)
        self.end = self.end or bool(begun and self.on_unhealthy != "warn")

    def on_step_end(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        model: "ActorCritic | None" = None,
        **kwargs: Any,
    ) -> None:
        """End training if `look` asked for it; a rollback undoes this step too."""
        if not self.end:
            return
        control.should_training_stop = True
        assert model is not None
        trained = model.trainable()
        with torch.no_grad(), whole(trained.values(), write=True):
            for name, tensor in self.healthy.items():
                trained[name].copy_(tensor)

    def examine(self, step: int, metrics: Mapping[str, float]) -> list[Finding]:
        """What is wrong with this rollout, given those before it."""
        kl, length = metrics["objective/kl"], metrics["completions/mean_length"]
        entropy, stopped = metrics["objective/entropy"], metrics["completions/stopped"]
        if not self.first:
            self.first = {"entropy": entropy, "length": length, "stopped": stopped}
        if metrics["value/explained_variance"] == metrics["value/explained_variance"]:
            self.explained.append(metrics["value/explained_variance"])
        self.spread.append(metrics["objective/scores_std"])
        found = []
        if not math.isfinite(kl + entropy):
            advice = "Lower learning_rate; look at the reward's numbers."
            found.append(Finding("not finite", step, kl + entropy, math.inf, advice))

        limit = KL_PER_TOKEN * length if self.kl_target is None else 4 * self.kl_target
        if kl > limit:
            advice = "Raise kl_coef, set kl_target, or lower learning_rate."
            found.append(Finding("kl runaway", step, kl, limit, advice))
        if entropy < 0.1 * self.first["entropy"]:
            advice = "Raise kl_coef, or lower learning_rate or num_ppo_epochs."
            found.append(Finding("entropy collapse", step, entropy, 0.1 * self.first["entropy"], advice))
        if length > 2 * self.first["length"] and stopped < 0.5 * self.first["stopped"]:
            advice = "Set missing_eos_penalty; the reward may prefer long answers."
            found.append(Finding("length growth", step, length, 2 * self.first["length"], advice))
        if len(self.explained) == PATIENCE and max(self.explained) <= 0:
            advice = "Raise critic_learning_rate or vf_coef, set critic_warmup_steps, or use value_mode: adapter."
            found.append(Finding("dead critic", step, max(self.explained), 0.0, advice))
        if len(self.spread) == PATIENCE and max(self.spread) < 1e-6:
            advice = "The reward no longer tells completions apart: other prompts, or another reward."
            found.append(Finding("reward saturation", step, max(self.spread), 1e-6, advice))
        return found
