"""PPO's defaults against those of TRL's trainers."""

import dataclasses

import pytest
from transformers import TrainingArguments
from trl import RewardConfig

from posttrain.ppo import PPOConfig

OF_EACH = {"learning_rate", "adam_epsilon"}  # defaults that PPOConfig and RewardConfig each set themselves


def test_defaults_are_those_of_trls_trainers():
    shared = {f.name for f in dataclasses.fields(TrainingArguments)} - OF_EACH
    mine, trls = ({f.name: f.default for f in dataclasses.fields(c)} for c in (PPOConfig, RewardConfig))
    assert {name: mine[name] for name in shared} == {name: trls[name] for name in shared}


@pytest.mark.parametrize(("given", "bf16"), [({}, True), ({"fp16": True}, False), ({"bf16": False}, False)])
def test_bf16_is_on_unless_fp16_is(given, bf16):
    assert PPOConfig("out", use_cpu=True, **given).bf16 is bf16
