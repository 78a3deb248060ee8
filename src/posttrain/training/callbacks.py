"""The callbacks of every training stage."""

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
    """All callbacks, in the order in which transformers calls them at each event.

    `stop_at_request` is last, because it raises, and a checkpoint must be marked as complete before that.
    """
    return [
        *([allocation(trainer)] if stage.config.adapter.method == "adalora" else []),
        watch_wrapper(trainer, stage.launch),
        mark_whole(stage.launch),
        tracking_callback(stage.tracker, clock, trainer),
        stop_at_request(),
    ]
