"""Rewards: adapters on the policy's base, separate reward models, Python functions.

Each is called with a rollout's prompts and completions, as text or messages, and returns one score per completion. A
reward model reads text that is rendered as in its training.
"""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.conversation import join, render
from .actor_critic import ActorCritic

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..models.scoring import Pooled

RewardFunction = Callable[..., Sequence[float]]


class ModelReward:
    """A reward model with its tokenizer; `pooled(model, ids, mask)` computes the scores (B,) of a batch."""

    def __init__(
        self, name: str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", pooled: "Pooled | None" = None
    ) -> None:
        self.name, self.model, self.tokenizer, self.pooled = name, model, tokenizer, pooled

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        from ..models.scoring import score

        sides = [render(join(p, c), self.tokenizer, eos=True) for p, c in zip(prompts, completions, strict=True)]
        return score(self.model, self.tokenizer, sides, pooled=self.pooled)


class FunctionReward:
    """A Python function, called as in TRL's trainers: `f(prompts=, completions=, <column>=..., ...)`."""

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


def classified(model: "PreTrainedModel", input_ids: Any, attention_mask: Any) -> Any:
    """Scores (B,) of a model that pools its rows itself, like BERT's."""
    return model(input_ids=input_ids, attention_mask=attention_mask).logits[:, 0].float()


def check_templates(rewards: Sequence[Any], dataset: "Dataset") -> None:
    """Raise ValueError if prompts are conversations and a reward model's tokenizer has no chat template."""
    conversations = dataset is not None and not isinstance(dataset[0]["prompt"], str)
    for reward in rewards:
        if conversations and isinstance(reward, ModelReward) and not reward.tokenizer.chat_template:
            raise ValueError(f"the tokenizer of reward {reward.name} has no chat template, and prompts are messages")


def as_reward(
    source: Any,
    tokenizer: "PreTrainedTokenizerBase",
    actor_critic: ActorCritic,
    policy_tokenizer: "PreTrainedTokenizerBase",
) -> Any:
    """Turn an entry of `reward_funcs` (a folder, model or function) into a callable. Raises ValueError for others."""
    from transformers import AutoTokenizer, PreTrainedModel
    from transformers.trainer_utils import unwrap_peft_model

    if isinstance(source, (str, Path)):
        adapter = actor_critic.add_reward_adapter(Path(source))
        return ModelReward(
            Path(source).parent.name, actor_critic.policy, policy_tokenizer,
            pooled=lambda model, ids, mask: actor_critic.reward_scores(ids, mask, adapter),
        )  # fmt: skip
    if isinstance(source, PreTrainedModel) or hasattr(source, "peft_config"):
        if source.config.num_labels != 1:
            raise ValueError(
                f"reward_funcs: {type(source).__name__} has {source.config.num_labels} labels; a reward model has one "
                "(num_labels=1)"
            )
        own = tokenizer or AutoTokenizer.from_pretrained(source.config.name_or_path)
        if own.pad_token_id is None:  # any id will do: padding is masked
            own.pad_token = own.eos_token
        source.eval().requires_grad_(False)
        has_score_head = hasattr(unwrap_peft_model(source), "score")
        return ModelReward(type(source).__name__, source, own, pooled=None if has_score_head else classified)
    if callable(source):
        return FunctionReward(source)
    raise ValueError(f"reward_funcs: expected a function, a model or a folder, got {source!r}")
