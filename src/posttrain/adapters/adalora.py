"""AdaLoRA's schedule and penalty (Zhang et al., 2023), which PEFT leaves to the training loop.

The schedule is set when training begins and advances after every optimizer step. Without it every rank is kept: LoRA
with another parametrisation. The penalty that keeps both factors near orthogonal reaches only a tagger's loss by itself
(`penalise`).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainerControl, TrainerState, TrainingArguments

WARMUP, FINAL = 0.1, 0.3  # shares of all steps: before ranks are cut, and after


def allocation(trainer: "Trainer") -> Any:
    """The callback that allocates ranks. Raises ConfigError under DeepSpeed, and for a run of a single step."""
    from transformers import TrainerCallback

    from ..errors import ConfigError

    if trainer.is_deepspeed_enabled:
        raise ConfigError("adapter.method: adalora reads gradients that DeepSpeed keeps to itself; use lora")

    class Allocation(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(
            self,
            args: "TrainingArguments",
            state: "TrainerState",
            control: "TrainerControl",
            model: "PreTrainedModel | None" = None,
            **kwargs: Any,
        ) -> None:
            if state.max_steps < 2:
                raise ConfigError(
                    "this run has one step, and adalora allocates ranks by the step before: more rows or max_steps"
                )
            config = self.adapted(model).peft_config["default"]
            config.total_step = state.max_steps
            config.tinit, config.tfinal = int(WARMUP * state.max_steps), int(FINAL * state.max_steps)
            config.deltaT = max(1, state.max_steps // 100)

        def on_optimizer_step(
            self,
            args: "TrainingArguments",
            state: "TrainerState",
            control: "TrainerControl",
            model: "PreTrainedModel | None" = None,
            **kwargs: Any,
        ) -> None:
            self.adapted(model).base_model.update_and_allocate(state.global_step + 1)

        def adapted(self, model: "PreTrainedModel") -> Any:
            return trainer.accelerator.unwrap_model(model)

    return Allocation()


def penalise(trainer: "Trainer") -> None:
    """Add AdaLoRA's penalty once to `trainer`'s training loss, however that loss is computed.

    PEFT adds it to the loss that a model returns, which only a tagger uses: DPO's and a reward model's loss are
    computed from the outputs, and TRL's fused head bypasses PEFT's forward. So PEFT's own penalty gets the weight 0.
    """
    import torch

    computed = trainer.compute_loss

    def compute_loss(model: "PreTrainedModel", inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        adapted = trainer.accelerator.unwrap_model(model)
        config = adapted.peft_config["default"]
        weight, config.orth_reg_weight = config.orth_reg_weight, 0.0
        try:
            loss, outputs = computed(model, inputs, return_outputs=True, **kwargs)
        finally:
            config.orth_reg_weight = weight
        if model.training:
            with torch.autocast(loss.device.type, enabled=False):
                penalty = weight * distance_from_orthogonal(adapted)
            # A loss normalised by the step's tokens is summed over micro-batches; any other is averaged later.
            is_share = trainer.compute_loss_func is not None or (
                trainer.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None
            )
            loss = loss + (penalty / trainer.current_gradient_accumulation_steps if is_share else penalty)
        return (loss, outputs) if return_outputs else loss

    trainer.compute_loss = compute_loss


def distance_from_orthogonal(model: "PreTrainedModel") -> Any:
    """The mean of |P'P - I| and |QQ' - I| over all layers (Frobenius norms), a scalar, as in PEFT 0.21."""
    import torch

    norms = []
    for name, p in model.named_parameters():
        if name.endswith(("lora_A.default", "lora_B.default")):
            product = p @ p.T if "lora_A" in name else p.T @ p
            norms.append(torch.linalg.norm(product - torch.eye(len(product), device=p.device)))
    return torch.stack(norms).mean()
