"""What torch 2.13 has no public API for."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerState


def has_hooks(module: Any) -> bool:
    """Whether a module has forward or backward hooks. torch has a public way to add them, and none to list them."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def replace_parameters(model: "PreTrainedModel", replaced: Mapping[Any, Any]) -> None:
    """Replace the parameters that are keys of `replaced` by its values, in every module of `model`.

    `setattr` would keep the dictionary of parameters that DeepSpeed's ZeRO-3 has installed in each module, which
    gathers a parameter whenever it is read.
    """
    for module in model.modules():
        module._parameters = {name: replaced.get(p, p) for name, p in module._parameters.items()}


def undo_fully_shard(module: Any) -> None:
    """Remove the hooks that `fully_shard` has put on a module, and restore the module's class.

    torch 2.13 has no way to undo `fully_shard`. `replace_parameters` restores the parameters.
    """
    from torch.distributed.fsdp import FSDPModule

    for handle in _hooks_of_fully_shard(module._get_fsdp_state()):
        handle.remove()
    module.__class__ = type(module).__mro__[FSDPModule._orig_cls_mro_index]


def _hooks_of_fully_shard(state: "TrainerState") -> Iterator[Any]:
    """The handles of fully_shard's hooks on forward passes and state dicts."""
    yield state._pre_forward_hook_handle
    yield state._post_forward_hook_handle
    for group in state._fsdp_param_groups:
        yield from group._module_to_pre_save_state_dict_hook_handle.values()
        yield from group._module_to_pre_load_state_dict_hook_handle.values()
        yield from (parameter._post_load_hook_handle for parameter in group.fsdp_params)
