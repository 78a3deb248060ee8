"""The table of recipes. Each row has everything that is known about one recipe.

Configuration, rows, PEFT methods, launch checks, the model card, the report, the closing table and the W&B workspace
read it. A new recipe on one of TRL's trainers is a row here, a script in `recipes/` and a test: CONTRIBUTING.md goes
through one, step by step. Imports no torch: trainers are named, not imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .metrics import EXACT_MATCH, GRADIENT, LEARNING_RATE, LOSS, NATS, ROLLOUT_SPEED, SPEED, STOPS, Measured, Panel
from .sections import (
    AdapterSettings,
    DataSettings,
    EvaluationSettings,
    GenerationSettings,
    ModelSettings,
    NerDataSettings,
    NerGates,
    NerSettings,
    ParallelSettings,
    PolicyGates,
    PPOSettings,
    RewardGates,
    RunSettings,
    SampleSettings,
    TrackingSettings,
    ValidationSettings,
)


@dataclass(frozen=True)
class Recipe:
    """One row of the table.

    Attributes:
        title: what it does, as a phrase after "by".
        label: a short name, for headings.
        makes: the kind of result that a finished stage gives to the next one.
        sections: the dataclasses of settings whose fields are its flat keys.
        groups: the keys that hold a mapping: `adapter`, `gates`.
        inputs: the roles of earlier stages that it may take as inputs.
        formats: row formats that it takes, after normalisation; () if it does not read rows in these formats.
        paper: the source of the method, or empty.
        trainer: (module, name) of its trainer's configuration class; None if it trains nothing.
        by_trl: whether the trainer is one of TRL's.
        defaults: its own defaults, in place of the configuration class's.
        ranges: accepted values of the configuration class's keys, in addition to SHARED_RANGES.
        draws: whether its trainer samples completions.
        pairs: whether a row is two sequences, chosen and rejected.
        several_processes: False if every process would do all of the work.
        refuses: strategy -> why it cannot be used, and what to use instead.
        measures: the numbers by which a finished stage is judged, the headline first.
        panels: the charts of its training, the most important first.
    """

    title: str
    label: str
    makes: Literal["policy", "reward model", "tagger", "pairs", "measurements"]
    sections: tuple[type, ...]
    groups: Mapping[str, type] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    paper: str = ""
    trainer: tuple[str, str] | None = None
    by_trl: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ranges: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    draws: bool = False
    pairs: bool = False
    several_processes: bool = True
    refuses: Mapping[str, str] = field(default_factory=dict)
    measures: tuple[Measured, ...] = ()
    panels: tuple[Panel, ...] = ()

    @property
    def answers_prompts(self) -> bool:
        """Whether a finished stage has answered the test rows, so that stages can be compared row by row."""
        return any(measure.paired for measure in self.measures)

    @property
    def all_panels(self) -> tuple[Panel, ...]:
        """Its own panels, and those of speed, memory and energy; empty for a recipe that trains nothing."""
        if self.trainer is None:
            return ()
        return (*self.panels, GRADIENT, LEARNING_RATE, *([ROLLOUT_SPEED] if self.draws else []), *SPEED)


# Defaults that differ from TRL's. An unset `bf16` is decided by the hardware (`models/precision.py`), since TRL's True
# is an error on a CPU; the others make a run quiet, resumable and comparable.
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

# TRL and transformers check few ranges, and late. A value outside of these would waste a run.
SHARED_RANGES: dict[str, dict[str, float]] = {
    "learning_rate": {"above": 0},
    "per_device_train_batch_size": {"min": 1},
    "per_device_eval_batch_size": {"min": 1},
    "gradient_accumulation_steps": {"min": 1},
    "num_train_epochs": {"above": 0},
    "max_length": {"min": 2},
    "logging_steps": {"above": 0},
    "save_steps": {"above": 0},
    "max_grad_norm": {"min": 0},
    "weight_decay": {"min": 0},
    "seed": {"min": 0},
}

# Keys of the trainers' configuration classes that no recipe uses -> what to do instead. They are refused.
UNUSED = {
    "resume_from_checkpoint": "a stage resumes by itself from the last whole checkpoint in its output_dir",
    "model_init_kwargs": "set dtype, attn_implementation, model_revision or load_in_4bit",
    "do_train": "a recipe trains, and measures where validation_file or test_file is set",
    "do_eval": "set eval_strategy and validation_file",
    "do_predict": "set test_file",
    "trackio_space_id": "report_to: trackio keeps a local page; `posttrain dashboard` shows it",
    "trackio_bucket_id": "report_to: trackio keeps a local page; `posttrain dashboard` shows it",
    "trackio_static_space_id": "report_to: trackio keeps a local page; `posttrain dashboard` shows it",
    "local_rank": "the launcher sets it: use accelerate launch",
}

_POLICY_GROUPS = {"adapter": AdapterSettings, "gates": PolicyGates}

RECIPES: dict[str, Recipe] = {
    "sft": Recipe(
        title="supervised fine-tuning",
        label="SFT",
        paper="Ouyang et al., 2022, section 3.5",
        makes="policy",
        sections=(
            ModelSettings, ParallelSettings, DataSettings, ValidationSettings, EvaluationSettings, GenerationSettings,
            TrackingSettings,
        ),
        groups=_POLICY_GROUPS,
        inputs=("policy", "data"),
        formats=("text", "messages", "prompt_completion"),
        trainer=("trl.trainer.sft_config", "SFTConfig"),
        by_trl=True,
        defaults={**_TRAINER_DEFAULTS, "learning_rate": 2e-4},
        measures=(*EXACT_MATCH, STOPS),
        panels=(
            LOSS,
            Panel("Tokens predicted right", ("mean_token_accuracy", "eval_mean_token_accuracy"), "share"),
            Panel("Entropy", ("entropy", "eval_entropy"), "nats per token"),
            Panel("Tokens seen", ("num_tokens",)),
        ),
    ),
    "reward": Recipe(
        title="a reward model",
        label="Reward model",
        paper="Bradley and Terry, 1952; Ouyang et al., 2022",
        makes="reward model",
        sections=(ModelSettings, DataSettings, ValidationSettings, TrackingSettings),
        groups={"adapter": AdapterSettings, "gates": RewardGates},
        inputs=("policy", "data"),
        formats=("preference",),
        trainer=("trl.trainer.reward_config", "RewardConfig"),
        by_trl=True,
        defaults={**_TRAINER_DEFAULTS, "learning_rate": 1e-4},
        pairs=True,
        measures=(
            Measured(
                "held_out_accuracy", "held-out pairs ranked right", counted=("held_out_pairs", "pairs"), hub="accuracy",
                split="validation",
            ),
        ),
        panels=(
            LOSS,
            Panel("Pairs ranked right", ("accuracy", "eval_accuracy"), "share"),
            Panel("Margin of chosen over rejected", ("margin", "eval_margin"), "score"),
            Panel("Scores in a batch: highest, mean, lowest", ("max_reward", "mean_reward", "min_reward"), "score"),
        ),
    ),
    "dpo": Recipe(
        title="direct preference optimisation",
        label="DPO",
        paper="Rafailov et al., 2023",
        makes="policy",
        sections=(
            ModelSettings, ParallelSettings, DataSettings, ValidationSettings, EvaluationSettings, GenerationSettings,
            TrackingSettings,
        ),
        groups=_POLICY_GROUPS,
        inputs=("policy", "data"),
        formats=("preference",),
        trainer=("trl.trainer.dpo_config", "DPOConfig"),
        by_trl=True,
        defaults={**_TRAINER_DEFAULTS, "learning_rate": 5e-5},
        ranges={"beta": {"min": 0}},
        pairs=True,
        measures=(*EXACT_MATCH, STOPS),
        panels=(
            LOSS,
            Panel("Margin", ("rewards/margins", "eval_rewards/margins"), "implicit reward"),
            Panel("Implicit rewards", ("rewards/chosen", "rewards/rejected"), "implicit reward"),
            Panel("Pairs ranked right", ("rewards/accuracies", "eval_rewards/accuracies"), "share"),
            Panel("Log-probabilities", ("logps/chosen", "logps/rejected"), NATS),
            Panel("Logits", ("logits/chosen", "logits/rejected")),
            Panel("Entropy", ("entropy",), "nats per token"),
        ),
    ),
    "ppo": Recipe(
        title="proximal policy optimisation",
        label="PPO",
        paper="Schulman et al., 2017",
        makes="policy",
        sections=(
            ModelSettings, DataSettings, ValidationSettings, EvaluationSettings, GenerationSettings, PPOSettings,
            TrackingSettings,
        ),
        groups=_POLICY_GROUPS,
        inputs=("policy", "reward"),
        formats=("prompt_completion", "prompt"),
        trainer=("posttrain.ppo.config", "PPOConfig"),
        defaults={**_TRAINER_DEFAULTS, "learning_rate": 1e-5},
        ranges={
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
        },
        draws=True,
        refuses={
            "fsdp2": "PPO's checkpoints do not gather what FSDP splits; use accelerate_configs/ddp.yaml, zero2.yaml or "
            "zero3.yaml"
        },
        measures=(
            *EXACT_MATCH,
            Measured("objective/kl", "KL from its start", kind="number", unit=NATS),
            STOPS,
        ),
        panels=(
            Panel("Reward", ("objective/scores", "eval_objective/scores"), "score"),
            Panel("KL from the reference", ("objective/kl", "eval_objective/kl"), NATS),
            Panel("Reward against KL", ("objective/scores",), "score", over="objective/kl"),
            Panel("Reward less KL", ("objective/rlhf_reward",), "score"),
            Panel("Spread of rewards", ("objective/scores_std",), "score"),
            Panel("Each reward", ("rewards/*",), "score"),
            Panel("KL coefficient", ("objective/kl_coef",)),
            Panel("Entropy", ("objective/entropy",), "nats per token"),
            Panel("Completion length", ("completions/mean_length",), "tokens"),
            Panel("Completions that end by EOS", ("completions/stopped",), "share"),
            Panel("Losses", ("loss/policy", "loss/value")),
            Panel("Approximate KL of an update", ("policy/approx_kl",), "nats per token"),
            Panel("Clipped tokens", ("policy/clip_fraction", "value/clip_fraction"), "share"),
            Panel("Ratio of new to old probabilities", ("policy/ratio",)),
            Panel("Returns explained by the critic", ("value/explained_variance",), "share of variance"),
        ),
    ),
    "ner": Recipe(
        title="named-entity recognition",
        label="Named entities",
        paper="Devlin et al., 2019, section 5.3",
        makes="tagger",
        sections=(ModelSettings, NerSettings, NerDataSettings, TrackingSettings),
        groups={"adapter": AdapterSettings, "gates": NerGates},
        trainer=("transformers.training_args", "TrainingArguments"),
        defaults={
            **_TRAINER_DEFAULTS,
            "learning_rate": 1e-3,
            "eval_strategy": "epoch",
            "label_names": ["labels"],
            "train_sampling_strategy": "group_by_length",
        },
        measures=(
            Measured("f1", "entity F1", kind="rate", counted=("sentences", "sentences"), hub="f1", split=None),
            Measured("precision", "entity precision", kind="rate", hub="precision", split=None, headline=False),
            Measured("recall", "entity recall", kind="rate", hub="recall", split=None, headline=False),
        ),
        panels=(
            LOSS,
            Panel("Entity F1 on validation", ("eval_f1", "eval_f1_*"), "F1"),
            Panel("Precision and recall", ("eval_precision", "eval_recall"), "share"),
        ),
    ),
    "sample": Recipe(
        title="sampled preference pairs",
        label="Samples",
        makes="pairs",
        sections=(ModelSettings, DataSettings, GenerationSettings, SampleSettings, RunSettings, TrackingSettings),
        inputs=("policy", "reward"),
        formats=("prompt_completion", "prompt"),
        measures=(
            Measured("pairs", "preference pairs", kind="count", counted=("prompts", "prompts")),
            Measured("mean_score", "mean score of a completion", kind="number", headline=False),
        ),
    ),
    "evaluate": Recipe(
        title="measuring a policy",
        label="Evaluation",
        makes="measurements",
        sections=(ModelSettings, EvaluationSettings, GenerationSettings, RunSettings, TrackingSettings),
        inputs=("policy",),
        formats=("prompt_completion",),
        several_processes=False,
        measures=EXACT_MATCH,
    ),
}  # fmt: skip

TRAINING = tuple(name for name, recipe in RECIPES.items() if recipe.trainer is not None)
