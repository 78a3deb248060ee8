"""Gathering the parameters that DeepSpeed's ZeRO-3 has partitioned: within a block, or for good after training.

Without ZeRO-3 these functions do nothing.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer


def disable_zero3_init() -> None:
    """Have transformers load complete weights, which PPO's roles and the gates need.

    Call it after the arguments are made and before a model is.
    """
    from ..upstream.transformers import forget_deepspeed

    forget_deepspeed()


def is_split(parameter: Any) -> bool:
    """Whether ZeRO-3 has partitioned this parameter, so that it is empty outside of a forward pass."""
    return hasattr(parameter, "ds_id")


@contextmanager
def before_split() -> Iterator[None]:
    """For computing with a model before ZeRO-3 partitions it: TRL's head gathers only parameters that are partitioned.

    A reference model may be partitioned already.
    """
    from ..upstream.trl import gathering_heads_of

    with gathering_heads_of(is_split):
        yield


@contextmanager
def whole(parameters: Iterable[Any], *, write: bool = False) -> Iterator[None]:
    """Gather these parameters on every process within the block; every process must enter it.

    With `write`, changes that the first process makes are kept, on all processes.
    """
    split = [p for p in parameters if is_split(p)]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split, modifier_rank=0 if write else None):
        yield


def gather_full_parameters(trainer: "Trainer") -> None:
    """Gather a trained model's parameters for good: from here on it is an ordinary model on every process."""
    from torch import nn

    from ..upstream.torch import replace_parameters

    model = trainer.accelerator.unwrap_model(trainer.model)
    gathered: dict[Any, Any] = {}
    for parameter in filter(is_split, model.parameters()):
        with whole([parameter]):
            gathered[parameter] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    if not gathered:
        return
    trainer.model_wrapped.destroy()  # or its hooks would look for partitioned parameters
    replace_parameters(model, gathered)
    trainer.model_wrapped = model
