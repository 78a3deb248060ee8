"""Checkpoints of adapters whose PEFT files do not contain everything that is trained.

For virtual tokens PEFT saves the encoder's output, not the encoder; for AdaLoRA it saves the remaining ranks, not the
importance scores that the next cut needs. Training cannot continue from either. So checkpoints of such runs have one
more file, which is used to resume:

    trained.safetensors    every trained parameter by name, and AdaLoRA's importance scores
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..models import is_prompt_learning

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

TRAINED = "trained.safetensors"
_ALLOCATOR = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def keep_all_that_is_trained(trainer: "Trainer") -> None:
    """Make `trainer` write TRAINED and resume from it if PEFT's own files are not enough; else do nothing."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "peft_config") or not (is_prompt_learning(model) or hasattr(model, "rankallocator")):
        return
    if trainer.is_deepspeed_enabled:  # its checkpoints hold every trained parameter
        return
    from safetensors.torch import load_file, save_file

    from ..upstream.transformers import add_to_checkpoints

    def write(folder: Path) -> None:
        save_file({k: v.detach().cpu().contiguous() for k, v in _state(model).items()}, folder / TRAINED)

    add_to_checkpoints(trainer, write, lambda folder: _load(model, load_file(folder / TRAINED)))


def _state(model: "PreTrainedModel") -> dict[str, Tensor]:
    state = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if hasattr(model, "rankallocator"):
        for kind in _ALLOCATOR:
            state |= {f"{kind}:{name}": value for name, value in getattr(model.rankallocator, kind).items()}
        pattern = model.peft_config["default"].rank_pattern or {}
        state |= {f"rank_pattern:{name}": torch.tensor(kept) for name, kept in pattern.items()}
    return state


def _load(model: "PreTrainedModel", saved: dict[str, Tensor]) -> None:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in saved.items():
        kind, colon, parameter = name.partition(":")
        if not colon:
            parameters.pop(name).data.copy_(tensor)
        elif kind == "rank_pattern":
            config = model.peft_config["default"]
            config.rank_pattern = {**(config.rank_pattern or {}), parameter: tensor.tolist()}
        else:
            getattr(model.rankallocator, kind)[parameter] = tensor.to(model.device)
    assert not parameters, f"a checkpoint without {sorted(parameters)[:3]}"
