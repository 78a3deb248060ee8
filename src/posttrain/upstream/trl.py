"""What TRL 1.16 does not export: functions of its trainers, and the parts of them that are replaced.

TRL promises the names in `trl.__all__` alone; `trl.trainer.utils` may change with any version. This module imports
TRL, and so seconds of torch and transformers.
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
    """Have TRL's fused head call `replacement(its own function).apply`, with the labelled positions alone.

    trl 1.16 gathers the labelled positions first on Triton devices alone (`add_fused_lm_head`; huggingface/trl#7244).
    In that module `_use_triton` decides nothing else. Safe to call again.
    """
    if not isinstance(utils._ChunkedLogProbFunction, replacement):
        utils._ChunkedLogProbFunction = replacement(utils._ChunkedLogProbFunction)
        utils._use_triton = lambda device: True


@contextmanager
def gathering_heads_of(is_split: Callable[[Any], bool]) -> Iterator[None]:
    """Meanwhile TRL's head gathers those of its parameters that ZeRO-3 has split, and no others.

    trl 1.16 asks every head for its ZeRO-3 status as soon as DeepSpeed is configured (`maybe_gather_lm_head_ctx`).
    """
    gather = utils.maybe_gather_lm_head_ctx
    utils.maybe_gather_lm_head_ctx = lambda *parameters: gather(*filter(is_split, parameters))
    try:
        yield
    finally:
        utils.maybe_gather_lm_head_ctx = gather


def recorded_metrics(trainer: "Trainer") -> dict[str, dict[str, list[float]]]:
    """What a trainer has recorded since its last log, by mode ("train", "eval") and name; to be changed in place."""
    recorded: dict[str, dict[str, list[float]]] = trainer._metrics
    return recorded


def unread_metrics() -> dict[str, Any]:
    """Attributes for a trainer whose `compute_loss` is to leave nothing behind: metrics, and a count of tokens."""
    return {"_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0}


def count_tokens_of_every_process(trainer: "Trainer") -> None:
    """Have a trainer count each process's tokens; TRL divides by `tp_size`, since tensor parallelism repeats them."""
    trainer._tp_size = 1


def make_vllm_generation(*args: Any, **options: Any) -> Any:
    """TRL's `VLLMGeneration`. Imports vllm."""
    from trl.generation.vllm_generation import VLLMGeneration

    return VLLMGeneration(*args, **options)
