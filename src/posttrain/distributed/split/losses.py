"""TRL's own losses on a pipeline: per micro-batch on the last stage, then loss and metrics of the full batch.

A trainer's `compute_loss(model, inputs)` calls `model(..., fused_lm_head=True)` once, and uses only its outputs per
token. So for each micro-batch the last stage takes the model's place, and its outputs are kept. After the last one,
`compute_loss` is called once more with the kept outputs of the full batch in the model's place: loss and metrics are
then those of one process with the full batch.

Micro-batch losses add up to the batch's. A sum over tokens divided by the batch's number of tokens (SFT) does so
already; a mean over pairs is weighted by the micro-batch's share of pairs, a mean over tokens by its share of tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import gcd
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...config.split_rules import TOKEN_LOSSES
from ...upstream.trl import unread_metrics
from .mesh import Mesh

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer


class LastStage:
    """The last stage in the model's place in `compute_loss`: it takes hidden states instead of embedding tokens."""

    def __init__(self, model: "PreTrainedModel", hidden: Tensor) -> None:
        self.model, self.hidden, self.outputs = model, hidden, None

    def __call__(self, *, input_ids: Tensor, **kwargs: Any) -> Any:
        self.outputs = self.model(inputs_embeds=self.hidden, **kwargs)
        return self.outputs


class MicroBatches:
    """A batch in equal parts, each laid out like a trainer's batch; pairs stay together.

    TRL's batch of n pairs is the chosen rows, then the rejected ones, (2n, T); each part has that order for its pairs.
    `rows` is the batch with its parts one after the other; `parts` is the list of them.
    """

    def __init__(self, inputs: Mapping[str, Tensor], count: int) -> None:
        self.inputs, self.is_pairs = inputs, "completion_mask" in inputs
        total = len(inputs["input_ids"])
        items = total // 2 if self.is_pairs else total
        self.count = gcd(items, count)  # an epoch's last batch may be smaller
        self.order = torch.arange(total)
        if self.is_pairs:
            self.order = self.order.view(2, self.count, -1).movedim(1, 0).flatten()
        self.rows = {name: tensor[self.order.to(tensor.device)] for name, tensor in inputs.items()}
        chunks = {name: tensor.chunk(self.count) for name, tensor in self.rows.items()}
        self.parts = [{name: chunk[k] for name, chunk in chunks.items()} for k in range(self.count)]

    def join(self, outputs: list[Any]) -> Any:
        """The last stage's outputs for all parts as one, in the batch's original order and without gradients."""
        back = torch.argsort(self.order)
        joined = {
            name: torch.cat([output[name].detach() for output in outputs])[back.to(value.device)]
            for name, value in outputs[0].items() if isinstance(value, Tensor) and value.ndim > 0
        }  # fmt: skip
        return type(outputs[0])(**joined)

    def token_shares(self) -> list[float]:
        """Each part's share of the tokens of chosen completions."""
        tokens = [int(part["completion_mask"].chunk(2)[0][:, 1:].sum()) for part in self.parts]
        return [n / max(1, sum(tokens)) for n in tokens]


@contextmanager
def gathering(trainer: "Trainer", gather: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the accelerator's `gather` within the block, where only some processes compute a loss."""
    accelerator = trainer.accelerator
    accelerator.gather = accelerator.gather_for_metrics = gather
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics


def gather_copies(mesh: Mesh) -> Callable[[Tensor], Tensor]:
    """accelerate's `gather`, but over the copies of the model only."""

    def gather(tensor: Tensor) -> Tensor:
        tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor.contiguous()
        found = [torch.empty_like(tensor) for _ in range(mesh.layout.data)]
        dist.all_gather(found, tensor, group=mesh.data)
        return torch.cat(found)

    return gather


@contextmanager
def set_aside(trainer: "Trainer", **values: Any) -> Iterator[None]:
    """Set attributes of a trainer within the block, and throw-away metrics and token counts."""
    values |= unread_metrics()
    kept = {name: getattr(trainer, name) for name in values}
    for name, value in values.items():
        setattr(trainer, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(trainer, name, value)


class BatchLoss:
    """The loss of one batch of `trainer`, computed part by part; used on the last stage only."""

    def __init__(self, trainer: "Trainer", batch: MicroBatches, num_items: Any, scale: float) -> None:
        self.trainer, self.batch, self.num_items, self.scale = trainer, batch, num_items, scale
        self.outputs: list[Any] = [None] * batch.count
        self.reference: list[tuple[Tensor, Tensor]] = [None] * batch.count  # type: ignore[list-item]
        self.shares = batch.token_shares() if batch.is_pairs else []

    def score_reference(self, k: int, hidden: Tensor) -> Tensor:
        """Keep the reference's log-probabilities of part k's pairs. Returns 0, as the schedule needs a loss."""
        model = getattr(self.trainer, "ref_model", None) or self.trainer.model
        self.reference[k] = self.trainer.compute_ref_log_probs(LastStage(model, hidden), self.batch.parts[k])
        return hidden.new_zeros(())

    def score(self, k: int, hidden: Tensor) -> Tensor:
        """The loss of part k, scaled so that the parts add up to the batch's loss."""
        model, part = LastStage(self.trainer.model, hidden), dict(self.batch.parts[k])
        with gathering(self.trainer, lambda tensor: tensor):
            if self.batch.is_pairs:
                part |= {"ref_chosen_logps": self.reference[k][0], "ref_rejected_logps": self.reference[k][1]}
                with set_aside(self.trainer, precompute_ref_logps=True, loss_weights=self._weights(k)):
                    loss = self.trainer.compute_loss(model, part)
            else:
                with set_aside(self.trainer):
                    loss = self.trainer.compute_loss(model, part, num_items_in_batch=self.num_items)
        self.outputs[k] = model.outputs
        scaled: Tensor = loss * self.scale
        return scaled

    def _weights(self, k: int) -> list[float]:
        return [
            weight * (self.shares[k] if kind in TOKEN_LOSSES else 1 / self.batch.count)
            for kind, weight in zip(self.trainer.loss_types, self.trainer.loss_weights, strict=True)
        ]

    @torch.no_grad()
    def finish(self, mesh: Mesh) -> Tensor:
        """The full batch's loss; records the trainer's metrics of it."""
        outputs, inputs = self.batch.join(self.outputs), dict(self.batch.inputs)
        options: dict[str, Any] = {} if self.batch.is_pairs else {"num_items_in_batch": self.num_items}
        if self.batch.is_pairs:
            chosen, rejected = (torch.cat(side) for side in zip(*self.reference, strict=True))
            inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
            self.trainer.precompute_ref_logps = True
        try:
            with gathering(self.trainer, gather_copies(mesh)):
                loss: Tensor = self.trainer.compute_loss(lambda **_: outputs, inputs, **options)
        finally:
            if self.batch.is_pairs:
                self.trainer.precompute_ref_logps = False
        return loss * self.scale
