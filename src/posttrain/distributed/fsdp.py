"""FSDP2 (torch's fully_shard): real on CPU processes too, and an ordinary model again when training is over."""

from collections.abc import Iterator
from typing import Any


def allow_on_cpu() -> None:
    """Have accelerate follow `distributed_type: FSDP` on CPU processes. Call it between the arguments and the trainer.

    accelerate 1.15 turns to FSDP from a list of device kinds that lacks MULTI_CPU (`AcceleratorState.__init__`), and
    trains with DDP without a word. torch runs fully_shard on gloo. So the process is shown to accelerate as one
    of a listed kind; the device, the backend and everything else stay the CPU's.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    state = PartialState._shared_state
    if state.get("distributed_type") == DistributedType.MULTI_CPU:
        state["distributed_type"] = DistributedType.MULTI_GPU


def choose_units(trainer: Any) -> None:
    """Split by transformer blocks alone: the input embedding, which accelerate 1.15 splits by itself, in none of them.

    It takes a unit for each of a model's `_no_split_modules`; BERT's and RoBERTa's name the module around the embedding
    too, and a parameter cannot be split twice.
    """
    plugin = trainer.accelerator.state.fsdp_plugin
    names = getattr(trainer.model, "_no_split_modules", None)
    if plugin.transformer_cls_names_to_wrap is not None or not names:
        return
    embedding = trainer.model.get_input_embeddings()
    around = {type(m).__name__ for m in trainer.model.modules() if any(child is embedding for child in m.modules())}
    plugin.transformer_cls_names_to_wrap = [name for name in names if name not in around]


def make_whole(trainer: Any) -> None:
    """Give a model that FSDP2 has split its parameters back: an ordinary model from here on, on every process.

    torch has no way back from fully_shard; this undoes what it did: DTensors as parameters, hooks, a class of its own
    for each module. Does nothing for any other model.
    """
    from torch import nn
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

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
    for module in model.modules():
        module._parameters = {name: gathered.get(p, p) for name, p in module._parameters.items()}
    for module in sharded:
        for handle in _hooks(module._get_fsdp_state()):
            handle.remove()
        vars(module).pop("generate", None)  # transformers has it run the hooks
        module.__class__ = type(module).__mro__[FSDPModule._orig_cls_mro_index]
    trainer.model = trainer.model_wrapped = model


def _hooks(state: Any) -> Iterator[Any]:
    """The handles of what fully_shard has hooked to forward passes and state dicts (torch 2.13)."""
    yield state._pre_forward_hook_handle
    yield state._post_forward_hook_handle
    for group in state._fsdp_param_groups:
        yield from group._module_to_pre_save_state_dict_hook_handle.values()
        yield from group._module_to_pre_load_state_dict_hook_handle.values()
        yield from (parameter._post_load_hook_handle for parameter in group.fsdp_params)
