"""The runs of ppo/test_zero.py, in each process of `accelerate launch ... zero_runs.py TINY ADAPTER REWARD OUT`."""

import os
import sys
from pathlib import Path

import pytest

from ppo.conftest import build, count_e

RUNS = {
    "head": {"value_mode": "head", "max_grad_norm": 0.1},
    "adapter": {"value_mode": "adapter", "critic_learning_rate": 1e-3},
    # After a first update the policy is further away than that: the run ends there, with the weights it began with.
    "rollback": {"on_unhealthy": "rollback", "kl_target": 1e-4},
}


def start(name: str, tiny: str, adapter: str, reward: str, out: Path, processes: int, **settings):
    """A trainer whose third step, where it saves, is in the middle of a rollout."""
    return build(
        tiny, out / name, continued=adapter, rewards=[reward, count_e], gradient_accumulation_steps=2, max_steps=5,
        per_device_train_batch_size=4 // processes, save_strategy="steps", save_steps=3, **RUNS[name], **settings,
    )  # fmt: skip


def run_all(tiny: str, adapter: str, reward: str, out: Path) -> None:
    """Each run, and again from its checkpoint, into `out`."""
    from deepspeed import DeepSpeedEngine

    from posttrain.distributed.deepspeed import disable_zero3_init
    from posttrain.models.precision import decide

    def start_one(name: str, **more):
        disable_zero3_init()
        decided = {k: v for k, v in decide({}).items() if k != "bf16"}
        return start(name, tiny, adapter, reward, out, 2, **decided, **more)

    for name in RUNS:
        for resumed in (False, True) if name != "rollback" else (False,):
            trainer = start_one(name)
            # The tiny model is below the size that ZeRO-3 splits.
            plugin = trainer.accelerator.state.deepspeed_plugin
            plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            trainer.train(resume_from_checkpoint=str(out / name / "checkpoint-3") if resumed else None)
            assert trainer.accelerator.num_processes == 2
            assert isinstance(trainer.model_wrapped, DeepSpeedEngine)
            trainer.save_model(str(out / f"{name}-{'resumed' if resumed else 'whole'}"))
    for setting in ({"kl_stop": 0.1}, {"critic_warmup_steps": 1}):
        with pytest.raises(ValueError, match="DeepSpeed"):
            start_one("head", **setting)


def main() -> None:
    from posttrain.models.cpu.lm_head import use_dense_lm_head

    use_dense_lm_head()
    for zero in ("2", "3"):  # one start of two processes for both: most of the time is imports
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = zero
        run_all(*sys.argv[1:4], Path(sys.argv[4]) / f"zero{zero}")


if __name__ == "__main__":
    main()
