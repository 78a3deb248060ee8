"""FSDP2 (torch's fully_shard): which blocks are sharded, and parameters gathered after training."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer


def choose_units(trainer: "Trainer") -> None:
    """Shard transformer blocks only, without the module around the input embedding.

    accelerate 1.15 shards the embedding by itself, and each of a model's `_no_split_modules`. BERT and RoBERTa list the
    module around the embedding there, and a parameter cannot be sharded twice.
    """
    from ..upstream.transformers import blocks_of

    plugin = trainer.accelerator.state.fsdp_plugin
    names = blocks_of(trainer.model)
    if plugin.transformer_cls_names_to_wrap is not None or not names:
        return
    embedding = trainer.model.get_input_embeddings()
    around = {type(m).__name__ for m in trainer.model.modules() if any(child is embedding for child in m.modules())}
    plugin.transformer_cls_names_to_wrap = [name for name in names if name not in around]


def gather_full_parameters(trainer: "Trainer") -> None:
    """Gather the parameters that FSDP2 has sharded for good: from here on an ordinary model on every process.

    torch has no way to undo fully_shard; this removes its DTensors, its hooks and its classes of modules. Does nothing
    for any other model.
    """
    from torch import nn
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    from ..upstream.torch import replace_parameters, undo_fully_shard

    model = trainer.accelerator.unwrap_model(trainer.model)
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not sharded:
        return
    for module in sharded:
        module.reshard()
    gathered: dict[Any, Any] = {}
    for parameter in [p for p in model.parameters() if isinstance(p, DTensor)]:
        full = parameter.full_tensor().detach().clone().to(trainer.accelerator.device)
        gathered[parameter] = nn.Parameter(full, requires_grad=parameter.requires_grad)
    replace_parameters(model, gathered)
    for module in sharded:
        undo_fully_shard(module)
        vars(module).pop("generate", None)  # transformers' wrapper, which runs FSDP's hooks
    trainer.model = trainer.model_wrapped = model
