"""LoRA's linear layer on a CPU: PEFT's arithmetic in fewer passes over memory.

PEFT computes `W x`, then `B (A x)`, then scales that, then adds the two; the last three are each a pass over an output
that has left the cache. Here one matrix product accumulates the scaled `B (A x)` into `W x`, forward and backward.
Adapters, names and files stay PEFT's. Everything but the plain case (so dropout, DoRA, several adapters, 4-bit weights,
autocast, hooks of ZeRO-3, of offloading or others) goes to PEFT's own forward. Two limits: global module hooks
(`register_module_forward_hook`) do not see the layer's parts, and there are no second derivatives.
`benchmarks/train.py --gains` measures it.

PPO uses two more functions: a rollout samples with the adapter `folded` into the weights, and an update computes policy
and critic `side_by_side`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def use_accumulated_lora() -> None:
    """Make PEFT's LoRA layers use this forward, in this process; safe to call again."""
    from ...upstream.peft import replace_lora_forward

    replace_lora_forward(_forward)


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`peft.tuners.lora.Linear.forward`."""
    if args or kwargs or not _is_plain(self, x):
        return self.peft_forward(x, *args, **kwargs)
    return _computed(self, x, self.active_adapters)


def _computed(layer: Any, x: Tensor, names: Sequence[str]) -> Tensor:
    base, scalings = layer.base_layer, tuple(layer.scaling[name] for name in names)
    adapters = [part[name].weight for name in names for part in (layer.lora_A, layer.lora_B)]
    y: Tensor = LowRankLinear.apply(x, base.weight, base.bias, scalings, *adapters)  # type: ignore[no-untyped-call]
    return y


class NotSideBySide(Exception):
    """A layer got an input whose shape is not the batch's."""


@contextmanager
def side_by_side(layers: Sequence[Any], names: Sequence[str], batch: torch.Size) -> Iterator[None]:
    """Compute each equal part of a batch with its own adapter: part k with `names[k]`, in one product with the base for
    all. PEFT's own way (`adapter_names`) is for inference only.

    `layers` are all layers of the adapters, and `all_plain`; `batch` is (rows, tokens) of the full batch. An input of
    that shape is assumed to have its rows in order. Not for gradient checkpointing: blocks would be recomputed after
    this has ended, with another adapter.

    Raises NotSideBySide, in the block, where an input has another shape, as in mixtures of experts, whose experts get
    some of the tokens.
    """
    try:
        for layer in layers:
            layer.forward = partial(_in_parts, layer, names, batch)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _in_parts(layer: Any, names: Sequence[str], batch: torch.Size, x: Tensor) -> Tensor:
    if x.shape[:-1] != batch or x.dtype != torch.float32:
        raise NotSideBySide(f"{tuple(x.shape)} of {x.dtype} where {tuple(batch)} is the batch")
    return _computed(layer, x, names)


def all_plain(layers: Sequence[Any], names: Sequence[str]) -> bool:
    """Whether there are layers, and all of them compute by `_forward` and are plain with each of these adapters."""
    if torch.is_autocast_enabled("cpu") or not layers:
        return False
    return all(type(m).forward is _forward and _is_plain_layer(m, names) for m in layers)


@contextmanager
def folded(model: "PreTrainedModel") -> Iterator[None]:
    """Within the block, every plain layer has `W + s B A` in place of W and the active adapter: one product, not three.

    The layer skips PEFT's forward, whose overhead on a merged layer exceeds the product for a few rows; so the adapter
    must not be switched meanwhile. The original weights are kept and restored exactly. Other layers are left alone,
    16-bit and 4-bit ones among them, where rounding the sum would change the policy.
    """
    from peft.tuners.lora import Linear

    kept = []
    try:
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, Linear) and _is_plain_with_one(layer):
                    (name,) = layer.active_adapters
                    weight, a, b = layer.base_layer.weight, layer.lora_A[name].weight, layer.lora_B[name].weight
                    summed = torch.addmm(weight, b, a, alpha=layer.scaling[name])
                    kept.append((layer, weight.data))
                    weight.data, layer.forward = summed, layer.base_layer.forward
        yield
    finally:
        for layer, data in kept:
            layer.base_layer.weight.data = data
            vars(layer).pop("forward", None)


def _is_plain(layer: Any, x: Tensor) -> bool:
    """Whether the layer is plain and the input is fp32 on a CPU, without autocast."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and _is_plain_with_one(layer)


def _is_plain_with_one(layer: Any) -> bool:
    return len(layer.active_adapters) == 1 and _is_plain_layer(layer, layer.active_adapters)


def _is_plain_layer(layer: Any, names: Sequence[str]) -> bool:
    """Whether a layer has frozen fp32 weights, and these adapters are plain LoRA without hooks on their modules."""
    base = layer.base_layer
    return (
        not (layer.disable_adapters or layer.merged or "forward" in vars(layer) or layer.fan_in_fan_out)
        and _is_untouched(base)
        and not (base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad))
        and all(_is_plain_adapter(layer, name) for name in names)
    )


def _is_plain_adapter(layer: Any, name: str) -> bool:
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias[name]:
        return False
    dropout = layer.lora_dropout[name]
    return (
        (isinstance(dropout, nn.Identity) or not dropout.training or dropout.p == 0)  # 0: TRL's way to switch it off
        and isinstance(layer.scaling[name], (int, float))
        and _is_untouched(layer.lora_A[name])
        and _is_untouched(layer.lora_B[name])
    )


def _is_untouched(part: Any) -> bool:
    """Whether a module is an ordinary nn.Linear with fp32 weights in host memory, and nothing hooked to it."""
    from ...upstream.torch import has_hooks

    if type(part) is not nn.Linear or "forward" in vars(part):  # accelerate's offloading puts one there
        return False
    weight = part.weight
    return (
        not has_hooks(part)
        and type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
    )


class LowRankLinear(torch.autograd.Function):
    """`y = x Wᵀ + bias + s (x Aᵀ) Bᵀ`, with W and the bias frozen.

    Shapes: x (..., I), W (O, I), A (r, I), B (O, r), y (..., O). Hu et al., 2021, equation 3. With n scalings, followed
    by n pairs of A and B, the rows of x are n equal parts, and part k uses pair k.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scalings: tuple[float, ...], *adapters: Tensor
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = x.new_empty(*x.shape[:-1], len(weight))  # returned itself: autograd forbids in-place changes of a view
        flat = y.view(-1, len(weight))
        if bias is None:
            torch.mm(rows, weight.mT, out=flat)
        else:
            torch.addmm(bias, rows, weight.mT, out=flat)
        count, lows = len(scalings), []
        for part, into, scaling, a, b in zip(
            rows.tensor_split(count), flat.tensor_split(count), scalings, adapters[::2], adapters[1::2], strict=True
        ):
            lows.append(part @ a.mT)
            into.addmm_(lows[-1], b.mT, alpha=scaling)
        ctx.save_for_backward(rows, weight, *adapters, *lows)
        ctx.scalings, ctx.shape = scalings, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, *kept = ctx.saved_tensors
        count, needed = len(ctx.scalings), ctx.needs_input_grad
        adapters, lows = kept[: 2 * count], kept[2 * count :]
        grad = grad.reshape(-1, grad.shape[-1])
        grad_x = grad @ weight if needed[0] else None
        grads: list[Tensor | None] = []
        parts = zip(
            rows.tensor_split(count), grad.tensor_split(count), lows, adapters[::2], adapters[1::2], strict=True
        )
        for number, (x, grad_y, low, a, b) in enumerate(parts):
            grad_low, scaling = grad_y @ b, ctx.scalings[number]
            if grad_x is not None:
                grad_x.tensor_split(count)[number].addmm_(grad_low, a, alpha=scaling)
            # beta=0: scaled by the product itself, whatever `a` and `b` hold
            first, second = needed[4 + 2 * number : 6 + 2 * number]
            grads.append(torch.addmm(a, grad_low.mT, x, beta=0, alpha=scaling) if first else None)
            grads.append(torch.addmm(b, grad_y.mT, low, beta=0, alpha=scaling) if second else None)
        return None if grad_x is None else grad_x.view(ctx.shape), None, None, None, *grads
