"""Tensor parallelism: each layer's matrices sharded over neighbouring processes (Shoeybi et al., 2019).

A column-wise layer (q, k, v, gate, up) has a shard of its outputs on each process, the row-wise one after it (o, down)
a shard of its inputs; one all-reduce follows each pair, forward and backward. The model's own `tp_plan` says which
layer is which, and transformers' parallel styles do the arithmetic. Of an adapter, `lora_B` is sharded with a
column-wise layer and `lora_A` with a row-wise one.

The adapter is made on the unsplit model first, so that it starts as on one process. On a model that was loaded in
shards, peft 0.21 builds `lora_A` of a row-wise layer for a shard's width: its shape and its initial scale are wrong.
"""

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.trainer_utils import unwrap_peft_model

from ...errors import ConfigError
from ...upstream.torch import replace_parameters
from ...upstream.transformers import install_parallel_style

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard(model: "PreTrainedModel", devices: Any) -> None:
    """Shard a model's layers over the processes of a one-dimensional device mesh, in place."""
    from peft.tuners.lora import Linear

    base = unwrap_peft_model(model)
    for name, module in list(base.named_modules()):
        style = base.tp_plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style is None or not any(True for _ in module.parameters()):  # another stage has it
            continue
        if not isinstance(module, Linear):
            _cut(style, module, devices)
            continue
        if style not in ("colwise", "rowwise") or module.lora_variant:
            raise ConfigError(f"adapter.target_modules: {name} ({style}) is not proven under tensor parallelism")
        for part in (module.lora_B if style == "colwise" else module.lora_A).values():
            _cut(style, part, devices)
        _cut(style, module.base_layer, devices)
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    if base.config.tie_word_embeddings and all(hasattr(end, "weight") for end in ends):
        ends[1].weight = ends[0].weight  # each was sharded separately, in the same way


def _cut(style: str, module: Any, devices: Any) -> None:
    module.whole_forward = vars(module).get("forward")
    install_parallel_style(style, module, devices)


def unshard(model: "PreTrainedModel") -> None:
    """Restore a sharded model's full parameters and its own `forward`. Every process of the mesh must call it."""
    whole: dict[Any, nn.Parameter] = {}
    for module in model.modules():
        if "whole_forward" in vars(module):
            del module.forward
            if module.whole_forward is not None:
                module.forward = module.whole_forward
            del module.whole_forward
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            whole[parameter] = nn.Parameter(
                parameter.full_tensor().detach().clone(), requires_grad=parameter.requires_grad
            )
    replace_parameters(model, whole)


def local(tensor: Any) -> Any:
    """This process's shard of a tensor, by reference."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Any) -> torch.Tensor:
    """The full tensor, gathered from all processes, which must all call it."""
    gathered: torch.Tensor = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
    return gathered


def cut_like(tensor: torch.Tensor, parameter: Any) -> torch.Tensor:
    """A full tensor, sharded like `parameter` and on its device."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
