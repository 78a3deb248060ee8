"""Functions of TRL 1.16 that it does not export, and parts of its trainers that are replaced.

Only the names in `trl.__all__` are public; `trl.trainer.utils` may change with any version. Importing this module
imports TRL, torch and transformers, which takes seconds.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trl.import_utils import is_vllm_available
from trl.models.utils import unwrap_model_for_generation
from trl.trainer import utils
from trl.trainer.utils import (
    add_fused_lm_head,
    compute_flops_per_token,
    disable_dropout_in_model,
    get_peak_flops,
    use_adapter,
)

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = [
    "add_fused_lm_head",
    "compute_flops_per_token",
    "count_tokens_of_every_process",
    "disable_dropout_in_model",
    "gathering_heads_of",
    "get_peak_flops",
    "is_vllm_available",
    "make_vllm_generation",
    "recorded_metrics",
    "replace_logprob_function",
    "unread_metrics",
    "unwrap_model_for_generation",
    "use_adapter",
]


def replace_logprob_function(replacement: type) -> None:
    """Have TRL's fused head call `replacement(its own function).apply`, with the labelled positions only.

    trl 1.16 gathers the labelled positions first only if `_use_triton` is true (`add_fused_lm_head`;
    huggingface/trl#7244). It decides nothing else in that module. Safe to call again.
    """
    if not isinstance(utils._ChunkedLogProbFunction, replacement):
        utils._ChunkedLogProbFunction = replacement(utils._ChunkedLogProbFunction)
        utils._use_triton = lambda device: True


@contextmanager
def gathering_heads_of(is_split: Callable[[Any], bool]) -> Iterator[None]:
    """A context in which TRL's head gathers only those of its parameters that ZeRO-3 has partitioned.

    trl 1.16 asks every head for its ZeRO-3 status once DeepSpeed is configured (`maybe_gather_lm_head_ctx`).
    """
    gather = utils.maybe_gather_lm_head_ctx
    utils.maybe_gather_lm_head_ctx = lambda *parameters: gather(*filter(is_split, parameters))
    try:
        yield
    finally:
        utils.maybe_gather_lm_head_ctx = gather


def recorded_metrics(trainer: "Trainer") -> dict[str, dict[str, list[float]]]:
    """A trainer's metrics since its last log, by mode ("train", "eval") and name. Callers may change them in place."""
    recorded: dict[str, dict[str, list[float]]] = trainer._metrics
    return recorded


def unread_metrics() -> dict[str, Any]:
    """Throw-away metrics and token count, to be set on a trainer whose `compute_loss` should leave no trace."""
    return {"_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0}


def count_tokens_of_every_process(trainer: "Trainer") -> None:
    """Have a trainer count each process's tokens; TRL divides by `tp_size`, since tensor parallelism repeats them."""
    trainer._tp_size = 1


def make_vllm_generation(*args: Any, **options: Any) -> Any:
    """TRL's `VLLMGeneration`. Imports vllm."""
    from trl.generation.vllm_generation import VLLMGeneration

    return VLLMGeneration(*args, **options)
