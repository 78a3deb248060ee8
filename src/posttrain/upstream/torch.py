"""What torch 2.13 has no public way for."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerState


def has_hooks(module: Any) -> bool:
    """Whether anything watches a module's forward or backward pass. torch offers ways to add hooks, none to ask."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def replace_parameters(model: "PreTrainedModel", replaced: Mapping[Any, Any]) -> None:
    """Put other parameters in the place of those that are keys of `replaced`, in every module of `model`.

    `setattr` would leave the dictionary that DeepSpeed's ZeRO-3 has put into each module in its place, and that one
    gathers what it hands out.
    """
    for module in model.modules():
        module._parameters = {name: replaced.get(p, p) for name, p in module._parameters.items()}


def undo_fully_shard(module: Any) -> None:
    """Take off a module what `fully_shard` has hooked to it, and give it its own class back.

    torch 2.13 has no way back from `fully_shard`. The parameters are for `replace_parameters`.
    """
    from torch.distributed.fsdp import FSDPModule

    for handle in _hooks_of_fully_shard(module._get_fsdp_state()):
        handle.remove()
    module.__class__ = type(module).__mro__[FSDPModule._orig_cls_mro_index]


def _hooks_of_fully_shard(state: "TrainerState") -> Iterator[Any]:
    """The handles of its hooks to forward passes and state dicts."""
    yield state._pre_forward_hook_handle
    yield state._post_forward_hook_handle
    for group in state._fsdp_param_groups:
        yield from group._module_to_pre_save_state_dict_hook_handle.values()
        yield from group._module_to_pre_load_state_dict_hook_handle.values()
        yield from (parameter._post_load_hook_handle for parameter in group.fsdp_params)
