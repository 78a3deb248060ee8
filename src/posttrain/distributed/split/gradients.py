"""Gradients of a split model, equal to those of one process: reduced over copies, their norm, clipping."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.trainer_utils import unwrap_peft_model

from .mesh import Mesh
from .tensor import local

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUCKET_BYTES = 64 * 2**20  # per all-reduce between copies of the model


def trained(model: "PreTrainedModel") -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


def tied_end(model: "PreTrainedModel", mesh: Mesh) -> Any | None:
    """The trained embedding that is tied to the other end of the pipeline; None if there is none here."""
    base = unwrap_peft_model(model)
    if mesh.layout.pipeline == 1 or not base.config.tie_word_embeddings or not (mesh.is_first or mesh.is_last):
        return None
    weight = base.get_input_embeddings().weight
    return weight if weight.requires_grad else None


def reduce(model: "PreTrainedModel", mesh: Mesh) -> None:
    """Sum the gradients of tied embeddings over both ends, and average all over the copies of the model."""
    for parameter in trained(model):
        if parameter.grad is None:  # every copy must send the same list
            parameter.grad = torch.zeros_like(parameter)
        # A sharded embedding gets the full gradient on each process; all-reduces need the same size on all of them.
        if isinstance(parameter, DTensor) and parameter.grad.placements != parameter.placements:
            parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
    tied = tied_end(model, mesh)
    if tied is not None:
        dist.all_reduce(local(tied.grad), group=mesh.ends)
    if mesh.layout.data > 1:
        for bucket in _buckets([local(p.grad) for p in trained(model)]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat, group=mesh.data)
            flat /= mesh.layout.data
            for gradient, part in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))


def _buckets(gradients: list[Any]) -> Iterator[list[Any]]:
    """Consecutive gradients of one dtype, up to BUCKET_BYTES."""
    bucket: list[Any] = []
    for gradient in gradients:
        size = sum(g.nbytes for g in bucket) + gradient.nbytes
        if bucket and (size > BUCKET_BYTES or bucket[0].dtype != gradient.dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def norm(model: "PreTrainedModel", mesh: Mesh) -> torch.Tensor:
    """The 2-norm of the full model's gradient, a scalar that is the same on every process.

    Squares of sharded gradients are summed over their processes; replicated ones count once, and so do tied embeddings.
    """
    cut = torch.zeros((), device=mesh.device)
    same = torch.zeros((), device=mesh.device)
    tied = tied_end(model, mesh)
    for parameter in trained(model):
        if parameter.grad is None or (parameter is tied and not mesh.is_first):
            continue
        square = torch.linalg.vector_norm(local(parameter.grad).float()) ** 2
        if isinstance(parameter, DTensor) and not parameter.placements[0].is_replicate():
            cut += square
        else:
            same += square
    if mesh.layout.tensor > 1:
        dist.all_reduce(cut, group=mesh.tensor)
    total = cut + same
    if mesh.layout.pipeline > 1:
        dist.all_reduce(total, group=mesh.pipeline)
    return total.sqrt()


def clip(model: "PreTrainedModel", mesh: Mesh, max_norm: float) -> torch.Tensor:
    """Clip the full gradient to the norm `max_norm`, and return its norm before, a scalar."""
    length = norm(model, mesh)
    scale = torch.clamp(max_norm / (length + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_
    for parameter in trained(model):
        if parameter.grad is not None:
            local(parameter.grad).mul_(scale)
    return length
