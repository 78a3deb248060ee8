"""Private parts of PEFT 0.21 that are used: of adapter layers, and of its list of methods."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def adapter_layers(model: "PreTrainedModel") -> list[Any]:
    """The modules of a model that have adapters to switch between: tuner layers and trained heads."""
    return [m for m in model.modules() if hasattr(m, "_active_adapter") and hasattr(m, "_disable_adapters")]


@contextmanager
def switched(layers: Sequence[Any], adapter: str | None) -> Iterator[None]:
    """A context in which `layers` (of `adapter_layers`) compute with this adapter, or with none.

    PEFT's `set_adapter` and `disable_adapter` would change `requires_grad` of the adapters that they switch.
    """
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._disable_adapters = adapter is None
        if adapter is not None:
            layer._active_adapter = [adapter]
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def replace_lora_forward(forward: Callable[..., Any]) -> None:
    """Replace the `forward` of PEFT's LoRA layers in this process, and keep PEFT's as `peft_forward`.

    Safe to call again.
    """
    from peft.tuners.lora import Linear

    if not hasattr(Linear, "peft_forward"):
        Linear.peft_forward, Linear.forward = Linear.forward, forward


def register_method(name: str, config: type, tuner: type, prefix: str) -> None:
    """Register a method with PEFT; safe to call again.

    `peft.utils.register_peft_method` accepts only names in PEFT's own enumeration, so its tables are filled here.
    """
    from peft import mapping

    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name] = config
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[name] = tuner
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[name] = prefix
