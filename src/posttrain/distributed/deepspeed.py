"""DeepSpeed's ZeRO-3 leaves a process a share of every parameter. Here they are whole again, for a while or for good.

Everywhere else, and under ZeRO-2, these do nothing.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer


def disable_zero3_init() -> None:
    """Have transformers load whole weights: roles are copied, and gates computed, from these.

    Call it once arguments are made, and before a model is.
    """
    from ..upstream.transformers import forget_deepspeed

    forget_deepspeed()


def is_split(parameter: Any) -> bool:
    """Whether ZeRO-3 has this parameter; outside a forward pass it is empty then."""
    return hasattr(parameter, "ds_id")


@contextmanager
def before_split() -> Iterator[None]:
    """While a model that ZeRO-3 will split is still whole: TRL's head gathers what is split, and only that.

    A reference model may be split already.
    """
    from ..upstream.trl import gathering_heads_of

    with gathering_heads_of(is_split):
        yield


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


def gather_full_parameters(trainer: "Trainer") -> None:
    """Give a trained model its parameters back: from here on it is an ordinary model, on every process."""
    from torch import nn

    from ..upstream.torch import replace_parameters

    model = trainer.accelerator.unwrap_model(trainer.model)
    gathered: dict[Any, Any] = {}
    for parameter in filter(is_split, model.parameters()):
        with whole([parameter]):
            gathered[parameter] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    if not gathered:
        return
    trainer.model_wrapped.destroy()  # its hooks would look for what they split
    replace_parameters(model, gathered)
    trainer.model_wrapped = model
