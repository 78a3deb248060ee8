"""AdaLoRA's schedule (Zhang et al., 2023): it begins when training does, and moves after every optimizer step.

PEFT leaves the call to the training loop. Without it every rank is kept: LoRA with another parametrisation.
"""

from typing import Any

WARMUP, FINAL = 0.1, 0.3  # shares of the steps before ranks are cut, and after


def allocation(trainer: Any) -> Any:
    """The callback that shares ranks out in `trainer`'s run. Raises ConfigError under DeepSpeed."""
    from transformers import TrainerCallback

    from ..errors import ConfigError

    if trainer.is_deepspeed_enabled:
        raise ConfigError("adapter.method: adalora reads gradients that DeepSpeed keeps to itself; use lora")

    class Allocation(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            config = self.adapted(model).peft_config["default"]
            config.total_step = state.max_steps
            config.tinit, config.tfinal = int(WARMUP * state.max_steps), int(FINAL * state.max_steps)
            config.deltaT = max(1, state.max_steps // 100)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.adapted(model).base_model.update_and_allocate(state.global_step + 1)

        def adapted(self, model: Any) -> Any:
            return trainer.accelerator.unwrap_model(model)

    return Allocation()
