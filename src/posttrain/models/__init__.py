"""Base models: loading, generation, scoring, precision; faster code on a CPU."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_prompt_learning(model: "PreTrainedModel") -> bool:
    """Whether one of a model's adapters has virtual tokens, which come before each row and its left padding."""
    configs = getattr(model, "peft_config", None) or {}
    return any(config.is_prompt_learning for config in configs.values())
