"""The bottleneck adapter (Houlsby et al., 2019), as a PEFT method.

    y = f(x);  y + W_up gelu(W_down y + b_down) + b_up

It follows the output projections of attention and of the feed-forward block, before the residual is added: Houlsby's
sequential adapter. `W_up` and `b_up` start at zero. It is non-linear, so it cannot be merged. PEFT 0.21 has no such
method, and the package `adapters` is pinned to an old transformers. Unlike Houlsby's, layer norms are not trained with
it (`modules_to_save` can name them).

A saved adapter is an ordinary PEFT directory; `import posttrain` makes plain PEFT able to load it.
"""

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ..upstream.peft import register_method

BOTTLENECK = "BOTTLENECK"
PREFIX = "bottleneck_"

# The output projections of a block's two sub-layers, by `model_type`; for other models, set `target_modules`.
_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
_LIKE_BERT = ("bert", "roberta", "xlm-roberta", "electra")

OUTPUT_PROJECTIONS = {
    **{name: ["o_proj", "down_proj"] for name in _LIKE_LLAMA},
    **{name: ["attention.output.dense", "output.dense"] for name in _LIKE_BERT},
}


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]
    """`reduction_factor` is hidden size over bottleneck size; the rest is as in every PEFT configuration."""

    reduction_factor: int = field(default=16)
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        self.peft_type = BOTTLENECK
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))


class BottleneckLayer(BaseTunerLayer, nn.Module):  # type: ignore[misc]
    """A linear layer followed by its bottleneck: (..., I) -> (..., O)."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("reduction_factor",)
    get_base_layer: Any  # of PEFT, whose types are not read
    set_adapter: Any
    active_adapters: Any
    _move_adapter_to_device_of_base_layer: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.bottleneck_down: Any = nn.ModuleDict()
        self.bottleneck_up: Any = nn.ModuleDict()
        self.reduction_factor: dict[str, int] = {}
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter. W_down is drawn as torch draws a linear layer; W_up and b_up are zero."""
        width = self.get_base_layer().out_features
        if width < config.reduction_factor:
            raise ValueError(f"reduction_factor {config.reduction_factor} is larger than the layer's {width} features")
        size = width // config.reduction_factor
        self.reduction_factor[adapter_name] = config.reduction_factor
        self.bottleneck_down[adapter_name] = nn.Linear(width, size)
        self.bottleneck_up[adapter_name] = up = nn.Linear(size, width)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                down, up = self.bottleneck_down[name], self.bottleneck_up[name]
                y = y + up(nn.functional.gelu(down(y.to(down.weight.dtype)))).to(y.dtype)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError("a bottleneck adapter is not linear: it cannot be merged into the weights of its base")

    def unmerge(self) -> None:
        """Nothing is ever merged."""


class BottleneckModel(BaseTuner):  # type: ignore[misc]
    """Puts `BottleneckLayer` behind the modules that a configuration targets."""

    prefix = PREFIX
    tuner_layer_cls = BottleneckLayer
    target_module_mapping = OUTPUT_PROJECTIONS

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if not hasattr(target, "out_features"):
            raise ValueError(
                f"a bottleneck adapter follows linear layers, and {current_key} is {type(target).__name__}"
            )
        layer = BottleneckLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


register_method(BOTTLENECK, BottleneckConfig, BottleneckModel, PREFIX)
