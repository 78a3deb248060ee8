"""Exact match of a policy on held-out rows: greedy, and as the mean over samples at temperature 1.

Intervals are 95%: Wilson's for the greedy share, a normal interval over row means for the sampled share, and one over
row differences for a change. Sampling is seeded per batch, so that the same policy and seed give the same numbers, and
two policies are sampled with the same random numbers.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..models.generation import generate
from ..runs.answers import Answer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int,
    batch_size: int,
    num_samples: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """A greedy completion and `num_samples` at temperature 1 for each of the prompt-completion `rows`."""
    completions = generate(
        model, tokenizer, [row["prompt"] for row in rows], temperatures=[0.0] + [1.0] * num_samples,
        max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed, progress=progress,
    )  # fmt: skip
    return [
        Answer(row["prompt"], row["completion"], cs[0].text, cs[0].stopped, [c.text for c in cs[1:]])
        for row, cs in zip(rows, completions, strict=True)
    ]
