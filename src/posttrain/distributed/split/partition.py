"""Pipeline stages: a model whose layers are on several processes, in order.

Every process keeps the model's module tree, so that names stay those of the unsplit model. Layers of other stages are
moved to the meta device, and a module that returns its input takes their place. Tied embeddings are on both ends.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.trainer_utils import unwrap_peft_model

from .mesh import Mesh

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PassOn(nn.Module):
    """Takes the place of a layer that another stage holds."""

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        return hidden


def owner_of(name: str, mesh: Mesh, layers: int) -> int:
    """The stage that owns a parameter or module, by its name in the unsplit model."""
    layer = re.search(r"(?:^|\.)layers\.(\d+)(?:\.|$)", name)
    if layer:
        return mesh.stage_of(int(layer[1]), layers)
    return 0 if "embed_tokens" in name else mesh.layout.pipeline - 1


class PipelinePartition:
    """Partitions a model into pipeline stages in place; `restore` undoes it."""

    def __init__(self, model: "PreTrainedModel", mesh: Mesh) -> None:
        self.mesh, self.base = mesh, unwrap_peft_model(model)
        self.layers = self.base.config.num_hidden_layers
        self.aside: dict[str, nn.Module] = {}
        for name in list(self._parts()):
            if not self._is_here(name):
                parent, _, own = name.rpartition(".")
                self.aside[name] = self.base.get_submodule(name).to("meta")
                setattr(self.base.get_submodule(parent), own, PassOn())

    def _parts(self) -> Iterator[str]:
        """Names of the modules that are distributed over stages, in the order of the forward pass."""
        trunk = self.base.base_model_prefix
        yield f"{trunk}.embed_tokens"
        for layer in range(self.layers):
            yield f"{trunk}.layers.{layer}"
        yield f"{trunk}.norm"
        yield "lm_head"

    def _is_here(self, name: str) -> bool:
        tied_end = self.base.config.tie_word_embeddings and name.endswith("embed_tokens") and self.mesh.is_last
        return owner_of(name, self.mesh, self.layers) == self.mesh.stage or tied_end

    def restore(self) -> None:
        """Give every stage the full model again. Every process of the pipeline must call it."""
        for name in self._parts():
            parent, _, own = name.rpartition(".")
            if name in self.aside:
                back = self.aside.pop(name).to_empty(device=self.mesh.device)
                setattr(self.base.get_submodule(parent), own, back)
        if self.base.config.tie_word_embeddings:
            self.base.get_output_embeddings().weight = self.base.get_input_embeddings().weight
        for name, tensor in (*self.base.named_parameters(), *self.base.named_buffers()):
            if ".rotary_emb." not in name:  # computed on every stage
                owner = owner_of(name, self.mesh, self.layers)
                with torch.no_grad():
                    dist.broadcast(tensor.data, group_src=owner, group=self.mesh.pipeline)
        self.base.train(self.base.training)
