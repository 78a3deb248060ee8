"""posttrain: SFT, reward models and preference optimisation, chained on Hugging Face TRL."""

from typing import Any

import wrapt

__version__ = "0.1.0"
__all__ = ["__version__"]


@wrapt.when_imported("peft")  # PEFT itself costs seconds
def _register_bottleneck(peft: Any) -> None:
    """Plain PEFT loads our bottleneck adapters once both are imported, in whichever order."""
    from .adapters.bottleneck import register

    register()
