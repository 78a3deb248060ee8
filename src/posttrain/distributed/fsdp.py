"""FSDP2 (torch's fully_shard): real on CPU processes too, and an ordinary model again when training is over."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer


def choose_units(trainer: "Trainer") -> None:
    """Split by transformer blocks alone: the input embedding, which accelerate 1.15 splits by itself, in none of them.

    It takes a unit for each of a model's `_no_split_modules`; BERT's and RoBERTa's name the module around the embedding
    too, and a parameter cannot be split twice.
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
    """Give a model that FSDP2 has split its parameters back: an ordinary model from here on, on every process.

    torch has no way back from fully_shard; this undoes what it did: DTensors as parameters, hooks, a class of its own
    for each module. Does nothing for any other model.
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
        vars(module).pop("generate", None)  # transformers has it run the hooks
    trainer.model = trainer.model_wrapped = model
