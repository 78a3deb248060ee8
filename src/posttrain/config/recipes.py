"""The one table of recipes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .sections import (
    AdapterSettings,
    DataSettings,
    EvaluationSettings,
    GateSettings,
    ModelSettings,
    NerDataSettings,
    NerSettings,
    ParallelSettings,
    PPOSettings,
    SampleSettings,
    TrackingSettings,
)


@dataclass(frozen=True)
class Recipe:
    """What one recipe accepts: TRL's class, our flat parts, the groups, the inputs, and the defaults that differ."""

    parts: tuple[type, ...]
    groups: Mapping[str, type]
    inputs: tuple[str, ...]
    trainer: tuple[str, str] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


# Where we leave TRL's defaults. `bf16` is decided by the hardware when nobody says (`precision.py`), since TRL's
# unconditional True is an error on a CPU; the rest makes a run quiet, resumable and comparable.
_TRAINER_DEFAULTS: dict[str, Any] = {
    "bf16": None,
    "disable_tqdm": True,
    "logging_steps": 5,
    "save_strategy": "steps",
    "save_steps": 50,
    "save_total_limit": 2,
    "logging_nan_inf_filter": False,
    "seed": 42,
}

_TRAINED = {"adapter": AdapterSettings, "gates": GateSettings}

RECIPES: dict[str, Recipe] = {
    "sft": Recipe(
        parts=(ModelSettings, ParallelSettings, DataSettings, EvaluationSettings, TrackingSettings),
        groups=_TRAINED,
        inputs=("policy", "data"),
        trainer=("trl.trainer.sft_config", "SFTConfig"),
        defaults={**_TRAINER_DEFAULTS, "learning_rate": 2e-4},
    ),
    "reward": Recipe(
        parts=(ModelSettings, DataSettings, TrackingSettings),
        groups=_TRAINED,
        inputs=("policy", "data"),
        trainer=("trl.trainer.reward_config", "RewardConfig"),
        defaults={**_TRAINER_DEFAULTS, "learning_rate": 1e-4},
    ),
    "dpo": Recipe(
        parts=(ModelSettings, ParallelSettings, DataSettings, EvaluationSettings, TrackingSettings),
        groups=_TRAINED,
        inputs=("policy", "data"),
        trainer=("trl.trainer.dpo_config", "DPOConfig"),
        defaults={**_TRAINER_DEFAULTS, "learning_rate": 5e-5},
    ),
    "ppo": Recipe(
        parts=(ModelSettings, DataSettings, EvaluationSettings, PPOSettings, TrackingSettings),
        groups=_TRAINED,
        inputs=("policy", "reward"),
        trainer=("posttrain.ppo.config", "PPOConfig"),
        defaults={**_TRAINER_DEFAULTS, "learning_rate": 1e-5},
    ),
    "ner": Recipe(
        parts=(ModelSettings, NerSettings, NerDataSettings, TrackingSettings),
        groups=_TRAINED,
        inputs=(),
        trainer=("transformers.training_args", "TrainingArguments"),
        defaults={
            **_TRAINER_DEFAULTS,
            "learning_rate": 1e-3,
            "eval_strategy": "epoch",
            "label_names": ["labels"],
            "train_sampling_strategy": "group_by_length",
        },
    ),
    "sample": Recipe(
        parts=(ModelSettings, DataSettings, EvaluationSettings, SampleSettings, TrackingSettings),
        groups={},
        inputs=("policy", "reward"),
    ),
    "evaluate": Recipe(
        parts=(ModelSettings, EvaluationSettings, SampleSettings, TrackingSettings),
        groups={},
        inputs=("policy",),
    ),
}

# TRL and transformers check little of a value's range, and late. These are the ones whose mistakes cost a run.
TRAINER_RANGES: dict[str, dict[str, float]] = {
    "learning_rate": {"above": 0},
    "per_device_train_batch_size": {"min": 1},
    "per_device_eval_batch_size": {"min": 1},
    "gradient_accumulation_steps": {"min": 1},
    "num_train_epochs": {"above": 0},
    "max_length": {"min": 2},
    "logging_steps": {"above": 0},
    "save_steps": {"above": 0},
    "beta": {"min": 0},
    "max_grad_norm": {"min": 0},
    "weight_decay": {"min": 0},
    "seed": {"min": 0},
    "num_mini_batches": {"min": 1},
    "num_ppo_epochs": {"min": 1},
    "max_completion_length": {"min": 1},
    "temperature": {"above": 0},
    "reward_clip": {"above": 0},
    "missing_eos_penalty": {"min": 0},
    "kl_coef": {"min": 0},
    "kl_target": {"above": 0},
    "kl_horizon": {"min": 1},
    "kl_stop": {"above": 0},
    "gamma": {"min": 0, "max": 1},
    "lam": {"min": 0, "max": 1},
    "clip_range": {"above": 0},
    "clip_range_high": {"above": 0},
    "dual_clip": {"min": 1},
    "vf_coef": {"min": 0},
    "value_clip": {"above": 0},
    "critic_learning_rate": {"above": 0},
    "critic_warmup_steps": {"min": 0},
}
