"""One pass of a batch through the pipeline, by torch.distributed.pipelining, with TRL's own loss on the last stage.

A batch is divided into micro-batches. A stage receives hidden states (rows, T, H) from the stage before and sends its
own to the next; the last passes them to `score`, which returns the micro-batch's loss. With `gpipe` all micro-batches
go forward before the first goes backward (Huang et al., 2019); with `1f1b` a stage alternates, and holds the
activations of as many micro-batches as there are stages from it to the last (Narayanan et al., 2019). Both give the
same gradients.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from transformers.trainer_utils import unwrap_peft_model

from .mesh import Mesh

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Score = Callable[[int, Tensor], Tensor]  # (micro-batch, hidden states) -> its loss, a scalar


class Stage(nn.Module):
    """This process's layers, as the schedule calls them."""

    def __init__(self, model: "PreTrainedModel", mesh: Mesh, autocast: Callable[[], Any]) -> None:
        super().__init__()
        self.model, self.mesh, self.autocast = model, mesh, autocast
        self.score: Score | None = None

    def forward(self, x: Tensor, attention_mask: Tensor, index: Tensor) -> Tensor:
        """`x` is token ids (rows, T) on the first stage, hidden states elsewhere; the last stage returns the loss."""
        if self.mesh.is_last:
            assert self.score is not None
            return self.score(int(index), x)
        base = unwrap_peft_model(self.model)
        name = "input_ids" if self.mesh.is_first else "inputs_embeds"
        with self.autocast():
            out = base.base_model(**{name: x}, attention_mask=attention_mask, use_cache=False)
        hidden: Tensor = out.last_hidden_state.to(base.dtype)
        return hidden


class Pipeline:
    """A model that is partitioned into stages, and the schedule that runs it."""

    def __init__(self, model: "PreTrainedModel", mesh: Mesh, *, autocast: Callable[[], Any]) -> None:
        self.mesh, self.stage = mesh, Stage(model, mesh, autocast)
        self.prepared: dict[bool, tuple[Any, Any]] = {}  # trains? -> (shapes, schedule), the latest

    def run(self, batch: Mapping[str, Tensor], count: int, score: Score, *, train: bool) -> None:
        """Send a batch forward in `count` equal micro-batches and, with `train`, its gradients backward.

        `batch` has `input_ids` and `attention_mask`, (rows, T), its micro-batches one after the other. Parameters
        accumulate the gradient of the sum of what `score` returns; it is called on the last stage only.
        """
        ids = batch["input_ids"]
        schedule = self._schedule((len(ids) // count, ids.shape[1]), count, train)
        self.stage.score = score
        what: dict[str, Any] = {"attention_mask": batch["attention_mask"], "index": torch.arange(count)}
        if train and self.mesh.is_last:
            what["target"] = torch.zeros(count)  # the schedule wants one; `score` has what it needs
        schedule.step(*([ids] if self.mesh.is_first else []), return_outputs=False, **what)
        self.stage.score = None

    def _schedule(self, shape: tuple[int, int], count: int, train: bool) -> Any:
        """A schedule for micro-batches of (rows, T). A PipelineStage has buffers of one shape, so another shape needs
        a new one."""
        made_for, schedule = self.prepared.get(train, (None, None))
        if made_for == (shape, count):
            return schedule
        layout, base = self.mesh.layout, unwrap_peft_model(self.stage.model)
        hidden = torch.empty(*shape, base.config.hidden_size, dtype=base.dtype, device="meta", requires_grad=train)
        ids = torch.empty(shape, dtype=torch.long, device="meta")
        # Without these shapes torch would infer them by an extra forward and backward pass.
        stage = PipelineStage(
            self.stage, self.mesh.stage, layout.pipeline, self.mesh.device, group=self.mesh.pipeline,
            input_args=ids if self.mesh.is_first else hidden,
            output_args=torch.empty((), device="meta", requires_grad=train) if self.mesh.is_last else hidden,
        )  # fmt: skip
        alternate = layout.schedule == "1f1b" and train and count >= layout.pipeline
        schedule = (Schedule1F1B if alternate else ScheduleGPipe)(
            stage, count, loss_fn=(lambda loss, _: loss) if train else None, scale_grads=False
        )
        self.prepared[train] = ((shape, count), schedule)
        return schedule
