"""What a trainer may show beyond transformers' own `Trainer`; one that does not is tracked without it."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ..data.tokens import count_tokens

if TYPE_CHECKING:
    from transformers import Trainer


class Finding(Protocol):
    """One thing that a trainer found wrong with its own run; `str()` says it in a sentence."""

    @property
    def name(self) -> str: ...


@runtime_checkable
class WatchesItself(Protocol):
    """It looks for what goes wrong, as PPO's health watch does."""

    @property
    def findings(self) -> Sequence[Finding]:
        """All so far, in the order in which they began."""
        ...


@runtime_checkable
class DrawsCompletions(Protocol):
    """It trains on completions that it draws itself."""

    @property
    def passes_per_token(self) -> float:
        """Forward passes for each token trained on, the update's own not counted: drawing, reference, rewards."""
        ...

    def pop_completions(self) -> list[dict[str, Any]]:
        """A few completions since the last call: `prompt`, `completion`, `score`, `kl` (nats per completion)."""
        ...


@runtime_checkable
class DescribesWork(Protocol):
    """It says itself what a run amounts to."""

    def describe_work(self) -> str:
        """Batch, steps and the like, in one line."""
        ...


@runtime_checkable
class TrainsPolicy(Protocol):
    """Its model has several roles, one of which is the policy."""

    @property
    def policy(self) -> Any:
        """The language model that is trained, out of accelerate's wrappers."""
        ...


@runtime_checkable
class SplitsModel(Protocol):
    """It has one copy of the model on several processes."""

    @property
    def layout(self) -> object:
        """How, as `str()` says it."""
        ...


def describe_batches(trainer: "Trainer") -> str:
    """What a run amounts to, in one line: global batch, steps and tokens, or what the trainer itself says."""
    if isinstance(trainer, DescribesWork):
        return trainer.describe_work()
    args = trainer.args
    copies = args.world_size // trainer.get_tp_size()  # of the model: processes that get another batch
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * copies
    per_epoch = max(1, -(-len(trainer.train_dataset) // batch))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    tokens = round(count_tokens(trainer.train_dataset) * steps / per_epoch)
    where = f"{copies} processes"
    if isinstance(trainer, SplitsModel):
        where = f"{copies} cop{'ies' if copies > 1 else 'y'} on {args.world_size} processes ({trainer.layout})"
    return (
        f"global batch {batch} = {args.per_device_train_batch_size} x {args.gradient_accumulation_steps} accumulated x "
        f"{where}; {steps} steps; {tokens:,} tokens"
    )


def trained_model(trainer: "Trainer") -> Any:
    """The model that a trainer was made for, out of accelerate's wrappers; of several roles, the policy."""
    return trainer.policy if isinstance(trainer, TrainsPolicy) else trainer.accelerator.unwrap_model(trainer.model)
