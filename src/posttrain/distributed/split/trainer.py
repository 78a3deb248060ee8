"""TRL's SFT and DPO trainers on a model that is split over processes.

The split exists only within `train`: the trainer is made with a complete model, `train` splits it, and restores it at
the end. The loss is TRL's; the loop, the learning-rate schedule and the log are transformers'; gradients, their norm
and checkpoints are assembled here. Private parts of both libraries are overridden: the versions are pinned, and
tests/distributed compares every kind of split with one process.
"""

import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import Trainer

from ...errors import ConfigError
from ...upstream.trl import count_tokens_of_every_process, recorded_metrics, use_adapter
from . import gradients
from .checkpoint import Order, collect, load_optimizer, save_optimizer, save_weights
from .layout import Layout
from .losses import BatchLoss, MicroBatches
from .mesh import Mesh, SplitParallelism
from .partition import PipelinePartition
from .pipeline import Pipeline
from .tensor import shard, unshard

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments


class SplitTrainer(Trainer):  # type: ignore[misc]
    """The first base of a class whose second base is SFTTrainer or DPOTrainer (see `split`)."""

    layout: Layout

    def __init__(self, *given: Any, args: "TrainingArguments", **options: Any) -> None:
        self.mesh = Mesh(self.layout, args.device)
        self.cuts: list[PipelinePartition] = []
        self.pipeline: Pipeline | None = None
        self.reference: Pipeline | None = None
        args.parallelism_config = SplitParallelism(self.layout)
        super().__init__(*given, args=args, **options)
        for name, module in self.model.named_modules():  # a continued adapter has its parent's dropout
            if isinstance(module, torch.nn.Dropout) and module.p > 0:
                raise ConfigError(
                    f"inputs.policy: its {name} has dropout {module.p:g}, and dropout on several processes differs "
                    "from one process: use adapter.start: merge, or train the policy with adapter.dropout: 0"
                )

    # Splitting and restoring

    def train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)
        self._make_whole()
        return result

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Split here: after transformers has read a checkpoint's weights, before it makes the optimizer."""
        self._split()
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _split(self) -> None:
        self.order = Order(self)
        for model in self._models():
            if self.layout.pipeline > 1:
                self.cuts.append(PipelinePartition(model, self.mesh))
            if self.layout.tensor > 1:
                shard(model, self.mesh.devices["tensor"])
        if not gradients.trained(self.model):
            raise ConfigError(
                f"adapter.target_modules: stage {self.mesh.stage} of the pipeline has nothing to train; target layers "
                "of every stage"
            )
        if self.layout.pipeline > 1:
            self.pipeline, *others = (
                Pipeline(model, self.mesh, autocast=self.accelerator.autocast) for model in self._models()
            )
            # An adapter's reference is the same model, with another adapter or none.
            self.reference = others[0] if others else self.pipeline if hasattr(self, "loss_types") else None
            count_tokens_of_every_process(self)  # metrics are gathered over copies of the model
        # The model manages its own placement and gradients: transformers wraps it in nothing.
        self.is_distributed_loading_by_transformers = True

    def _models(self) -> list[Any]:
        """The models to split: the policy, and DPO's reference if it is a separate model."""
        reference = getattr(self, "ref_model", None)
        return [self.model] if reference is None else [self.model, reference]

    def _make_whole(self) -> None:
        for model in self._models():
            if self.layout.tensor > 1:
                unshard(model)
        while self.cuts:
            self.cuts.pop(0).restore()
        self.pipeline = self.reference = None
        self.is_distributed_loading_by_transformers = False

    def _sync_replicated_trainable_parameters(self, model: "PreTrainedModel") -> None:
        """Nothing: transformers would average everything that is no DTensor over all processes, while
        `gradients.reduce` averages over the right ones."""

    # Step

    def training_step(self, model: "PreTrainedModel", inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if self.pipeline is None:
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = self._pipeline_step(self._prepare_inputs(inputs), num_items_in_batch)
        if self.accelerator.sync_gradients:
            gradients.reduce(self.model, self.mesh)
        return loss

    def _pipeline_step(self, inputs: Any, num_items: Any) -> torch.Tensor:
        """Forward and backward pass of one batch; returns its loss on every stage."""
        assert self.pipeline is not None
        self.model.train()
        batch = MicroBatches(inputs, self.layout.micro_batches)
        # As in `Trainer.training_step`: a loss that is a mean over its batch is divided by the accumulation steps.
        scaled = self.model_accepts_loss_kwargs and num_items is not None
        scaled = scaled if self.loss_is_scaled_for_ga is None else self.loss_is_scaled_for_ga
        loss = BatchLoss(self, batch, num_items, 1.0 if scaled else 1 / self.current_gradient_accumulation_steps)
        if self.reference is not None:
            with torch.no_grad(), self._as_reference():
                self.reference.run(batch.rows, batch.count, loss.score_reference, train=False)
        self.pipeline.run(batch.rows, batch.count, loss.score, train=True)
        total = loss.finish(self.mesh) if self.mesh.is_last else torch.zeros((), device=self.mesh.device)
        dist.broadcast(total, group_src=self.layout.pipeline - 1, group=self.mesh.pipeline)
        return total

    def _as_reference(self) -> Any:
        """Switch to DPO's reference adapter while stages run it; on the last stage TRL's own function does that."""
        if self.mesh.is_last or not hasattr(self.model, "peft_config"):
            return nullcontext()
        return use_adapter(self.model, adapter_name="ref" if "ref" in self.model.peft_config else None)

    def _clip_grad_norm(self, model: "PreTrainedModel") -> torch.Tensor:
        return gradients.clip(self.model, self.mesh, self.args.max_grad_norm)

    def _get_grad_norm(self, model: "PreTrainedModel", grad_norm: Any = None) -> Any:
        return gradients.norm(self.model, self.mesh) if grad_norm is None else grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Send the metrics from the last stage to process 0, which writes them."""
        if self.pipeline is not None:
            metrics = recorded_metrics(self)
            found = [metrics["train"]]
            dist.broadcast_object_list(found, group_src=self.layout.pipeline - 1, group=self.mesh.pipeline)
            metrics["train"] = found[0]
        super().log(logs, start_time)

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir or self.args.output_dir
        state = collect(self.order.own(self.model, self.mesh), self.mesh)
        if self.args.should_save:
            save_weights(self.model, state, folder)
            self.processing_class.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_optimizer(self, self.order, self.mesh, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _save_rng_state(self, output_dir: str) -> None:
        """Wait until all files are written: process 0 then writes trainer_state.json, which marks a checkpoint as
        complete."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        load_optimizer(self, self.order, checkpoint)
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, "scheduler.pt"), weights_only=True))


def split(trainer_class: Any, layout: Layout | None) -> Any:
    """A subclass of `trainer_class` (SFTTrainer or DPOTrainer) that splits its model; the class itself without
    `layout`."""
    if layout is None:
        return trainer_class
    from .trainer import SplitTrainer

    return type(f"Split{trainer_class.__name__}", (SplitTrainer, trainer_class), {"layout": layout})
