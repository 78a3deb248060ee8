"""DeepSpeed's ZeRO-3 leaves a process a share of every parameter. Here they are whole again, for a while or for good.

Everywhere else, and under ZeRO-2, these do nothing.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


def load_whole() -> None:
    """Have transformers load whole weights. Call it once arguments are made, and before a model is.

    accelerate 1.15 has ZeRO-3 split them while they are read, whatever `zero3_init_flag` says
    (`DeepSpeedPlugin.set_deepspeed_weakref`); roles are copied, and gates computed, from whole ones.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def is_split(parameter: Any) -> bool:
    """Whether ZeRO-3 has this parameter; outside a forward pass it is empty then."""
    return hasattr(parameter, "ds_id")


@contextmanager
def before_split() -> Iterator[None]:
    """While a model that ZeRO-3 will split is still whole: TRL's head gathers what is split, and only that.

    trl 1.16 asks every head for its ZeRO-3 status as soon as DeepSpeed is configured
    (`trl/trainer/utils.py`, `maybe_gather_lm_head_ctx`); a reference model may be split already.
    """
    from trl.trainer import utils

    gather = utils.maybe_gather_lm_head_ctx
    utils.maybe_gather_lm_head_ctx = lambda *parameters: gather(*(p for p in parameters if is_split(p)))
    try:
        yield
    finally:
        utils.maybe_gather_lm_head_ctx = gather


@contextmanager
def whole(parameters: Iterable[Any], *, write: bool = False) -> Iterator[None]:
    """Gather these on every process, which must all come here. With `write`, the first process's are kept."""
    split = [p for p in parameters if is_split(p)]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split, modifier_rank=0 if write else None):
        yield


def make_whole(trainer: Any) -> None:
    """Give a trained model its parameters back: from here on it is an ordinary model, on every process."""
    from torch import nn

    model = trainer.accelerator.unwrap_model(trainer.model)
    gathered: dict[Any, Any] = {}
    for parameter in filter(is_split, model.parameters()):
        with whole([parameter]):
            gathered[parameter] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    if not gathered:
        return
    trainer.model_wrapped.destroy()  # its hooks would look for what they split
    for module in model.modules():
        module._parameters = {name: gathered.get(p, p) for name, p in module._parameters.items()}
    trainer.model_wrapped = model
