"""Scores of a reward model, read at each row's last token."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from . import is_prompt_learning

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Pooled = Callable[[Any, Any, Any], Any]


def score(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    sides: Sequence[list[int]],
    *,
    batch_size: int = 64,
    pooled: Pooled | None = None,
) -> list[float]:
    """The score of each row of token ids, padded on the right and read at each row's last token.

    `pooled(model, input_ids, attention_mask)` computes a batch's scores (B,); default: `pooled_scores`.
    """
    import torch

    was_training = model.training
    model.eval()
    scores: list[float] = [0.0] * len(sides)
    order = sorted(range(len(sides)), key=lambda i: len(sides[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(sides[i]) for i in batch)
        ids = torch.tensor([sides[i] + [tokenizer.pad_token_id] * (width - len(sides[i])) for i in batch])
        mask = torch.tensor([[1] * len(sides[i]) + [0] * (width - len(sides[i])) for i in batch])
        with torch.no_grad():
            out = (pooled or pooled_scores)(model, ids.to(model.device), mask.to(model.device))
        for i, value in zip(batch, out.tolist(), strict=True):
            scores[i] = value
    model.train(was_training)
    return scores


def pooled_scores(model: "PreTrainedModel", input_ids: Any, attention_mask: Any) -> Any:
    """Scores (B,) at the last attended token of right-padded (B, T) rows, whatever the pad id is."""
    from transformers.trainer_utils import unwrap_peft_model

    if is_prompt_learning(model):  # only PEFT's forward adds virtual tokens; transformers finds the last token
        return model(input_ids=input_ids, attention_mask=attention_mask).logits[:, 0].float()
    base = unwrap_peft_model(model)
    trunk = getattr(base, base.base_model_prefix)
    hidden = trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    last = last_attended(hidden, attention_mask)
    return base.score(last.to(base.score.weight.dtype) if hasattr(base.score, "weight") else last)[:, 0].float()


def last_attended(hidden: Any, attention_mask: Any) -> Any:
    """The hidden states (B, H) at the last attended token of right-padded rows (B, T, H)."""
    import torch

    return hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(1) - 1]
