"""Where scores come from: a reward adapter on the policy's base, a reward model of its own, a Python function.

Each is called with the prompts and completions of a rollout, as text or messages, and gives one number a completion. A
reward model reads text rendered as it was in its training.
"""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..reward import Pooled, score
from ..tokens import join, render
from .actor_critic import ActorCritic

RewardFunction = Callable[..., Sequence[float]]


class ModelReward:
    """A sequence-classification model with its tokenizer; `pooled(model, ids, mask)` gives a batch's scores."""

    def __init__(self, name: str, model: Any, tokenizer: Any, pooled: Pooled | None = None) -> None:
        self.name, self.model, self.tokenizer, self.pooled = name, model, tokenizer, pooled

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        sides = [render(join(p, c), self.tokenizer, eos=True) for p, c in zip(prompts, completions, strict=True)]
        return score(self.model, self.tokenizer, sides, pooled=self.pooled)


class FunctionReward:
    """A Python function called as TRL's trainers call theirs: `f(prompts=, completions=, <column>=..., ...)`."""

    def __init__(self, function: RewardFunction) -> None:
        if inspect.iscoroutinefunction(function):
            raise ValueError(f"reward_funcs: {function.__name__} is a coroutine; a reward here is a plain function")
        self.name = getattr(function, "__name__", type(function).__name__)
        self.function = function

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        scores = self.function(prompts=prompts, completions=completions, **columns)
        if len(scores) != len(prompts):
            raise ValueError(f"reward {self.name} gave {len(scores)} scores for {len(prompts)} completions")
        return [float("nan") if s is None else float(s) for s in scores]


def as_reward(source: Any, tokenizer: Any, actor_critic: ActorCritic, policy_tokenizer: Any) -> Any:
    """What `reward_funcs` may hold, as something to call. Raises ValueError for anything else."""
    from transformers import AutoTokenizer, PreTrainedModel

    if isinstance(source, (str, Path)):
        actor_critic.add_reward_adapter(Path(source))
        return ModelReward(
            Path(source).parent.name, actor_critic.policy, policy_tokenizer,
            pooled=lambda model, ids, mask: actor_critic.reward_scores(ids, mask),
        )  # fmt: skip
    if isinstance(source, PreTrainedModel) or hasattr(source, "peft_config"):
        own = tokenizer or AutoTokenizer.from_pretrained(source.config._name_or_path)
        source.eval().requires_grad_(False)
        return ModelReward(type(source).__name__, source, own)
    if callable(source):
        return FunctionReward(source)
    raise ValueError(f"reward_funcs: expected a function, a model or a folder, got {source!r}")
