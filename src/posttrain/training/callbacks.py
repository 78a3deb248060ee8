"""The callbacks that every stage trains with."""

from typing import TYPE_CHECKING, Any

from ..adapters.adalora import allocation
from ..distributed.checkpoints import mark_whole
from ..distributed.checks import watch_wrapper
from ..launch.stop import stop_at_request
from ..tracking.callback import tracking_callback
from ..tracking.performance import StepClock

if TYPE_CHECKING:
    from transformers import Trainer

    from .stage import Stage


def callbacks_of(stage: "Stage", trainer: "Trainer", clock: StepClock) -> list[Any]:
    """All of them, in the order in which transformers calls them at each event.

    A checkpoint is marked as whole before a run that was asked to stop ends behind it: that callback raises, and so is
    the last one.
    """
    return [
        *([allocation(trainer)] if stage.config.adapter.method == "adalora" else []),
        watch_wrapper(trainer, stage.launch),
        mark_whole(stage.launch),
        tracking_callback(stage.tracker, clock, trainer),
        stop_at_request(),
    ]
