"""Adapters: every PEFT method by one key; created, continued from the stage before, merged.

Names are imported on first use, because `import peft` loads `adapters.bottleneck` and with it this file.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runs.paths import ADAPTER, MODEL
    from .configs import peft_config
    from .start import (
        attach,
        copied_reference,
        count_parameters,
        fold_for_generation,
        load_adapter_base,
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
    "load_adapter_base",
    "load_policy",
    "merged_onto",
    "peft_config",
    "start_model",
    "unload_merged",
    "without_adapter",
]


def __getattr__(name: str) -> Any:
    """PEP 562: one of `__all__`, from the module that defines it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    elsewhere = {"ADAPTER": "..runs.paths", "MODEL": "..runs.paths", "peft_config": ".configs"}
    return getattr(importlib.import_module(elsewhere.get(name, ".start"), __name__), name)
