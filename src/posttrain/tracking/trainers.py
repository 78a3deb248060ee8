"""Optional interfaces of a trainer, as protocols. A trainer without one is tracked without its data."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ..data.tokens import count_tokens

if TYPE_CHECKING:
    from transformers import Trainer


class Finding(Protocol):
    """A problem that a trainer found in its own run; `str()` is a sentence about it."""

    @property
    def name(self) -> str: ...


@runtime_checkable
class WatchesItself(Protocol):
    """A trainer that looks for problems itself, as PPO's health watch does."""

    @property
    def findings(self) -> Sequence[Finding]:
        """All findings so far, in the order in which they began."""
        ...


@runtime_checkable
class DrawsCompletions(Protocol):
    """A trainer that samples the completions that it trains on."""

    @property
    def passes_per_token(self) -> float:
        """Forward passes per trained token beside the update's own: generation, reference, rewards."""
        ...

    def pop_completions(self) -> list[dict[str, Any]]:
        """Some completions since the last call: `prompt`, `completion`, `score`, `kl` (nats per completion)."""
        ...


@runtime_checkable
class DescribesWork(Protocol):
    """A trainer that describes the size of its run itself."""

    def describe_work(self) -> str:
        """Batch, steps and the like, in one line."""
        ...


@runtime_checkable
class TrainsPolicy(Protocol):
    """A trainer whose model has several roles, one of which is the policy."""

    @property
    def policy(self) -> Any:
        """The language model that is trained, without accelerate's wrappers."""
        ...


@runtime_checkable
class SplitsModel(Protocol):
    """A trainer that splits a model over several processes."""

    @property
    def layout(self) -> object:
        """The layout; `str()` describes it."""
        ...


def describe_batches(trainer: "Trainer") -> str:
    """The size of a run in one line: global batch, steps and tokens, or the trainer's own description."""
    if isinstance(trainer, DescribesWork):
        return trainer.describe_work()
    args = trainer.args
    copies = args.world_size // trainer.get_tp_size()  # copies of the model, each with its own batch
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
    """The model that a trainer trains, without accelerate's wrappers; of several roles, the policy."""
    return trainer.policy if isinstance(trainer, TrainsPolicy) else trainer.accelerator.unwrap_model(trainer.model)
