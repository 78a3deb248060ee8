"""posttrain: SFT, reward models and preference optimisation, chained on Hugging Face TRL."""

import importlib
import sys
from typing import Any

import wrapt

__version__ = "0.2.0"
__all__ = ["__version__"]


@wrapt.when_imported("peft")  # PEFT itself costs seconds
def _register_bottleneck(peft: Any) -> None:
    """Plain PEFT loads our bottleneck adapters once both are imported, in whichever order."""
    if "posttrain.adapters.bottleneck" not in sys.modules:  # or it is what imports PEFT, and registers itself
        importlib.import_module("posttrain.adapters.bottleneck")
