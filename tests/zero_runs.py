"""The runs of test_zero.py, in each process of `accelerate launch ... zero_runs.py TINY ADAPTER REWARD OUT`."""

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


def main(tiny: str, adapter: str, reward: str, out: Path) -> None:
    from deepspeed import DeepSpeedEngine

    from posttrain.lm_head import use_dense_lm_head
    from posttrain.precision import decide
    from posttrain.zero import load_whole

    def build_one(name: str, **more):
        load_whole()
        return start(name, tiny, adapter, reward, out, 2, **settings, **more)

    use_dense_lm_head()
    settings = {k: v for k, v in decide({}).items() if k != "bf16"}
    for name in RUNS:
        for resumed in (False, True):
            trainer = build_one(name)
            # The tiny model is below the size that ZeRO-3 splits.
            plugin = trainer.accelerator.state.deepspeed_plugin
            plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            trainer.train(resume_from_checkpoint=str(out / name / "checkpoint-3") if resumed else None)
            assert trainer.accelerator.num_processes == 2
            assert isinstance(trainer.model_wrapped, DeepSpeedEngine)
            trainer.save_model(str(out / f"{name}-{'resumed' if resumed else 'whole'}"))
            if name == "rollback":
                break
    for setting in ({"kl_stop": 0.1}, {"critic_warmup_steps": 1}):
        with pytest.raises(ValueError, match="DeepSpeed"):
            build_one("head", **setting)


if __name__ == "__main__":
    main(*sys.argv[1:4], Path(sys.argv[4]))
