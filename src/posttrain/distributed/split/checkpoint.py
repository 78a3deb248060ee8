"""Checkpoints of a split model, in the files of a single process, so that any layout of as many copies can read them.

    adapter_model.safetensors | model.safetensors     full tensors, under the names of the unsplit model
    optimizer.pt                                      full moments of every parameter, in the order of one process

Each file is assembled in process 0's host memory. To read one, a process maps the file and takes its own part.
"""

import os
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from .mesh import Mesh
from .partition import owner_of
from .tensor import cut_like, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

OPTIMIZER = "optimizer.pt"  # transformers' name


class Order:
    """The names of the unsplit model's trained parameters, in the order and groups of its optimizer."""

    def __init__(self, trainer: "Trainer") -> None:
        model = trainer.model
        decayed = set(trainer.get_decay_parameter_names(model))
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.groups = ([n for n in names if n in decayed], [n for n in names if n not in decayed])
        self.names = [*self.groups[0], *self.groups[1]]
        self.layers = model.config.num_hidden_layers

    def own(self, model: "PreTrainedModel", mesh: Mesh) -> dict[str, Any]:
        """The trained parameters that this stage saves: tied ones belong to one stage only."""
        return {
            name: p for name, p in model.named_parameters()
            if p.requires_grad and owner_of(name, mesh, self.layers) == mesh.stage
        }  # fmt: skip


def collect(tensors: Mapping[str, Any], mesh: Mesh) -> dict[str, Tensor]:
    """Gather the full tensors of every stage in process 0's host memory; {} elsewhere. All processes must call it."""
    if mesh.data_rank != 0:
        return {}
    gathered: dict[str, Tensor] = {}
    shapes: list[Any] = [{name: (t.shape, t.dtype) for name, t in tensors.items()}]
    if mesh.layout.pipeline > 1:
        shapes = [None] * mesh.layout.pipeline
        described = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        dist.all_gather_object(shapes, described, group=mesh.pipeline)
    for stage, described in enumerate(shapes):
        for name, (shape, dtype) in described.items():
            if stage == mesh.stage:
                tensor = whole(tensors[name])
                if stage == 0 and mesh.tensor_rank == 0:
                    gathered[name] = tensor.cpu().contiguous().clone()
                elif mesh.tensor_rank == 0:
                    dist.send(tensor.to(mesh.device).contiguous(), group_dst=0, group=mesh.pipeline)
            elif mesh.is_first and mesh.tensor_rank == 0:
                buffer = torch.empty(shape, dtype=dtype, device=mesh.device)
                dist.recv(buffer, group_src=stage, group=mesh.pipeline)
                gathered[name] = buffer.cpu()
    return gathered


def save_weights(model: "PreTrainedModel", state: Mapping[str, Tensor], folder: str) -> None:
    """Write an adapter or a full model as PEFT and transformers read them; `state` is by parameter name.

    PEFT's and transformers' own writers take the names from the model, and a stage has only some of them.
    """
    os.makedirs(folder, exist_ok=True)
    if not hasattr(model, "peft_config"):
        model.config.save_pretrained(folder)
        save_file(dict(state), Path(folder) / "model.safetensors", metadata={"format": "pt"})
        return
    config = copy(model.peft_config["default"])
    config.inference_mode = True  # as PEFT writes it
    config.save_pretrained(folder)
    names = {name: name.replace(".default.", ".") for name in state}
    save_file(
        {names[n]: t for n, t in state.items()}, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"}
    )


def save_optimizer(trainer: "Trainer", order: Order, mesh: Mesh, folder: str) -> None:
    """Write `optimizer.pt` as a single process would."""
    own = {parameter: name for name, parameter in order.own(trainer.model, mesh).items()}
    moments = {
        f"{own[parameter]} {kind}": value
        for parameter, state in trainer.optimizer.state.items() if parameter in own
        for kind, value in state.items()
    }  # fmt: skip
    gathered = collect(moments, mesh)
    if not trainer.args.should_save:
        return
    place = {name: i for i, name in enumerate(order.names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in gathered.items():
        name, kind = key.split(" ")
        state.setdefault(place[name], {})[kind] = value
    # Groups of one process differ in weight decay alone; a stage may have only some of them.
    shared = {k: v for k, v in trainer.optimizer.param_groups[0].items() if k not in ("params", "weight_decay")}
    decay = (trainer.args.weight_decay, 0.0)
    groups = [
        {**shared, "weight_decay": d, "params": [place[n] for n in names]}
        for d, names in zip(decay, order.groups, strict=True)
    ]
    os.makedirs(folder, exist_ok=True)
    torch.save({"state": state, "param_groups": groups}, Path(folder) / OPTIMIZER)


def load_optimizer(trainer: "Trainer", order: Order, folder: str) -> None:
    """Load this process's part of `optimizer.pt`."""
    saved = torch.load(Path(folder) / OPTIMIZER, map_location="cpu", mmap=True, weights_only=True)
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    place = {name: i for i, name in enumerate(order.names)}
    state, groups, count = {}, [], 0
    for group in trainer.optimizer.param_groups:
        first = names[group["params"][0]] if group["params"] else order.names[0]
        kept = next(g for g in saved["param_groups"] if place[first] in g["params"])
        groups.append({**kept, "params": list(range(count, count + len(group["params"])))})
        for parameter in group["params"]:
            found = saved["state"].get(place[names[parameter]], {})
            # Moments are sharded like their parameter; the step count is a scalar.
            state[count] = {k: cut_like(v.clone(), parameter) if v.ndim else v.clone() for k, v in found.items()}
            count += 1
    trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})
