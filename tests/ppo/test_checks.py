"""Settings that `PPOTrainer` refuses, with their messages, and settings that it accepts."""

import pytest

from posttrain.ppo import PPOConfig
from posttrain.ppo.checks import check_settings


def settings(tmp_path, **given):
    return PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **given)


@pytest.mark.parametrize(
    "given, launched, message",
    [
        ({}, {"is_fsdp": True}, "do not gather what FSDP splits"),
        ({"kl_stop": 0.1}, {"is_deepspeed": True}, "kl_stop cannot leave out an optimizer step of DeepSpeed's"),
        ({"critic_warmup_steps": 2}, {"is_deepspeed": True}, "critic_warmup_steps cannot keep DeepSpeed"),
        ({"kl_stop": 0.1, "fp16": True}, {}, "fp16's gradient scaler cannot leave out"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            {},
            "load_best_model_at_end: PPO's checkpoints are to resume from",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, given, launched, message):
    with pytest.raises(ValueError, match=message):
        check_settings(settings(tmp_path, **given), **{"is_fsdp": False, "is_deepspeed": False, **launched})


@pytest.mark.parametrize("given", [{}, {"kl_stop": 0.1}, {"critic_warmup_steps": 2}, {"fp16": True}])
def test_each_setting_alone_is_accepted(tmp_path, given):
    check_settings(settings(tmp_path, **given), is_fsdp=False, is_deepspeed=False)
    check_settings(settings(tmp_path), is_fsdp=False, is_deepspeed=True)
