"""LoRA's linear layer on a CPU: PEFT's sums in fewer passes over memory.

PEFT computes `W x`, then `B (A x)`, then scales that, then adds the two; the last three are each a pass over an output
that has left the cache. Here `B (A x)` is accumulated, scaled, into `W x` by one matrix product, forwards and
backwards. Adapters, names and files stay PEFT's, and whatever is not the plain case (dropout, DoRA, several adapters,
4-bit weights, autocast, the hooks of ZeRO-3, of offloading and others) goes to PEFT's own forward. Hooks for all
modules (`register_module_forward_hook`) do not see the layer's parts, and it is differentiated once, not twice.
`benchmarks/train.py --gains` measures it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def use_accumulated_lora() -> None:
    """Give PEFT's LoRA layers this forward, in this process; safe to call again."""
    from peft.tuners.lora import Linear

    if not hasattr(Linear, "peft_forward"):
        Linear.peft_forward, Linear.forward = Linear.forward, _forward


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`peft.tuners.lora.Linear.forward`."""
    if args or kwargs or not _is_plain(self, x):
        return self.peft_forward(x, *args, **kwargs)
    (name,) = self.active_adapters
    base, a, b = self.base_layer, self.lora_A[name], self.lora_B[name]
    y: Tensor = LowRankLinear.apply(x, base.weight, base.bias, a.weight, b.weight, self.scaling[name])  # type: ignore[no-untyped-call]
    return y


@contextmanager
def folded(model: Any) -> Iterator[None]:
    """`W + s B A` in place of W and the active adapter, in every plain layer: one product, not three.

    The layer calls that product and nothing of PEFT's, whose own way to a merged layer takes longer, for a few rows,
    than a small product; so another adapter cannot be chosen meanwhile. The weights are put back, not computed back.
    Layers that are not plain (16 and 4 bits among them, where the sum would be rounded to another policy) stay as they
    are.
    """
    from peft.tuners.lora import Linear

    kept = []
    try:
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, Linear) and _is_plain_layer(layer):
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
    """Whether this input meets a plain layer, in fp32."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and _is_plain_layer(layer)


def _is_plain_layer(layer: Any) -> bool:
    """Whether a layer has frozen fp32 weights and one plain adapter, with nothing that watches their modules."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1 or "forward" in vars(layer):
        return False
    (name,) = layer.active_adapters
    base = layer.base_layer
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias[name] or layer.fan_in_fan_out:
        return False
    dropout = layer.lora_dropout[name]
    parts = (base, layer.lora_A[name], layer.lora_B[name])
    return (
        (not dropout.training or isinstance(dropout, nn.Identity))
        and isinstance(layer.scaling[name], (int, float))
        and all(_is_untouched(part) for part in parts)
        and not (base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad))
    )


def _is_untouched(part: Any) -> bool:
    """Whether calling a linear module is no more than its product with fp32 weights in memory."""
    if type(part) is not nn.Linear or "forward" in vars(part):  # accelerate's offloading puts one there
        return False
    weight = part.weight
    return (
        not (part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)
        and type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
    )


class LowRankLinear(torch.autograd.Function):
    """`y = x Wᵀ + bias + s (x Aᵀ) Bᵀ`, with W and the bias frozen.

    Shapes: x (..., I), W (O, I), A (r, I), B (O, r), y (..., O). Hu et al., 2021, equation 3.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.mT
        ctx.save_for_backward(rows, weight, a, b, low)
        ctx.scaling, ctx.shape = scaling, x.shape
        y = x.new_empty(*x.shape[:-1], len(weight))  # returned itself: of a view, autograd forbids changes in place
        flat = y.view(-1, len(weight))
        if bias is None:
            torch.mm(rows, weight.mT, out=flat)
        else:
            torch.addmm(bias, rows, weight.mT, out=flat)
        flat.addmm_(low, b.mT, alpha=scaling)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, low = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_low = grad @ b
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, a, alpha=ctx.scaling).view(ctx.shape)
        if ctx.needs_input_grad[3]:  # beta=0: scaled by the product itself, whatever `a` holds
            grad_a = torch.addmm(a, grad_low.mT, rows, beta=0, alpha=ctx.scaling)
        if ctx.needs_input_grad[4]:
            grad_b = torch.addmm(b, grad.mT, low, beta=0, alpha=ctx.scaling)
        return grad_x, None, None, grad_a, grad_b, None
