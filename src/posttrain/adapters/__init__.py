"""Adapters: one switch for every PEFT method; made fresh, taken over from the stage before, merged away."""

from ..runs.paths import ADAPTER, MODEL
from .configs import peft_config
from .start import (
    attach,
    copied_reference,
    count_parameters,
    fold_for_generation,
    foundation,
    load_policy,
    merged_onto,
    start_model,
    unload_merged,
    without_adapter,
)

__all__ = [
    "ADAPTER",
    "MODEL",
    "attach",
    "copied_reference",
    "count_parameters",
    "fold_for_generation",
    "foundation",
    "load_policy",
    "merged_onto",
    "peft_config",
    "start_model",
    "unload_merged",
    "without_adapter",
]
