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
    parameter: Any
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            full = parameter.detach().full_tensor().clone().to(trainer.accelerator.device)
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
