"""What a stage is told: TRL's own configuration class as it is, and beside it what TRL lacks.

A stage's file is flat YAML. Its keys are the fields of TRL's class for that recipe (`learning_rate`, `beta`, ...), the
fields of the dataclasses below, and three groups: `adapter`, `gates` and `inputs`. The command line overrides it with
`--key value` and `--group.key value`. Nothing here imports torch: a typo is reported before anything heavy is loaded.

Left out: TRL's `ModelConfig`, whose `lora_*` and `use_peft` fields would be a second place for what `adapter` says.
"""

import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import yaml

from .errors import ConfigError
from .schema import coerce, describe, fields_of

T = TypeVar("T")


@dataclass(frozen=True)
class ModelSettings:
    """Which base model, and how it is held in memory."""

    model_name_or_path: str = ""
    model_revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str | None = None
    load_in_4bit: bool = False  # QLoRA: NF4 weights through bitsandbytes (Dettmers et al., 2023)
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True


@dataclass(frozen=True)
class DataSettings:
    """Where the rows come from. A file is .json, .jsonl (.gz), .csv or .parquet, or a folder of them.

    `train_file` may be a list of `{path, weight}`: weights are the expected shares of rows drawn from each file.
    """

    train_file: Any = None
    validation_file: Any = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str | None = None
    data_format: Literal[
        "auto", "text", "messages", "prompt_completion", "prompt", "preference", "unpaired", "alpaca", "sharegpt"
    ] = "auto"
    on_bad_row: Literal["stop", "skip"] = "stop"
    max_train_rows: int | None = field(default=None, metadata={"min": 1})


@dataclass(frozen=True)
class EvaluationSettings:
    """Exact match on held-out prompt-completion rows, greedy and sampled at temperature 1."""

    test_file: Any = None
    test_rows: int | None = field(default=None, metadata={"min": 1})
    test_samples: int = field(default=4, metadata={"min": 0})
    max_new_tokens: int = field(default=64, metadata={"min": 1})
    generation_batch_size: int = field(default=64, metadata={"min": 1})
    seed: int = 42


@dataclass(frozen=True)
class SampleSettings:
    """Drawing completions from a policy and ranking them into preference pairs."""

    output_dir: str = ""
    num_samples: int = field(default=8, metadata={"min": 2})
    temperature: float = field(default=1.0, metadata={"above": 0})
    top_p: float = field(default=1.0, metadata={"above": 0, "max": 1})
    verifier: str | None = None  # exact_match | regex:PATTERN | module:function; none when a reward model scores
    pairs_per_prompt: int = field(default=1, metadata={"min": 1})
    validation_share: float = field(default=0.1, metadata={"min": 0, "max": 0.5})
    overwrite: bool = False


@dataclass(frozen=True)
class PPOSettings:
    """What PPO's rewards are, beside the reward model of `inputs.reward`."""

    verifier: str | None = None  # exact_match | regex:PATTERN | module:function


@dataclass(frozen=True)
class AdapterSettings:
    """Group `adapter`. `start` says how a stage takes over its input's adapter (see adapters.py)."""

    method: Literal["lora", "rslora", "dora", "none"] = "lora"
    r: int = field(default=16, metadata={"min": 1})
    alpha: float = field(default=32, metadata={"above": 0})
    dropout: float = field(default=0.0, metadata={"min": 0, "max": 0.99})
    target_modules: Any = "all-linear"
    modules_to_save: list[str] | None = None
    start: Literal["continue", "merge"] = "continue"


@dataclass(frozen=True)
class GateSettings:
    """Group `gates`: what a stage must prove before the next one may build on it."""

    stops: float | None = field(default=None, metadata={"min": 0, "max": 1})  # share of completions that end by EOS
    reward_accuracy: float | None = field(default=None, metadata={"min": 0, "max": 1})  # floor, on validation pairs


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
    "report_to": "none",
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
        parts=(ModelSettings, DataSettings, EvaluationSettings),
        groups=_TRAINED,
        inputs=("policy", "data"),
        trainer=("trl.trainer.sft_config", "SFTConfig"),
        defaults={**_TRAINER_DEFAULTS, "learning_rate": 2e-4},
    ),
    "reward": Recipe(
        parts=(ModelSettings, DataSettings),
        groups=_TRAINED,
        inputs=("policy", "data"),
        trainer=("trl.trainer.reward_config", "RewardConfig"),
        defaults={**_TRAINER_DEFAULTS, "learning_rate": 1e-4},
    ),
    "dpo": Recipe(
        parts=(ModelSettings, DataSettings, EvaluationSettings),
        groups=_TRAINED,
        inputs=("policy", "data"),
        trainer=("trl.trainer.dpo_config", "DPOConfig"),
        defaults={**_TRAINER_DEFAULTS, "learning_rate": 5e-5},
    ),
    "ppo": Recipe(
        parts=(ModelSettings, DataSettings, EvaluationSettings, PPOSettings),
        groups=_TRAINED,
        inputs=("policy", "reward"),
        trainer=("posttrain.ppo.config", "PPOConfig"),
        defaults={**_TRAINER_DEFAULTS, "learning_rate": 1e-5},
    ),
    "sample": Recipe(
        parts=(ModelSettings, DataSettings, EvaluationSettings, SampleSettings),
        groups={},
        inputs=("policy", "reward"),
    ),
    "evaluate": Recipe(
        parts=(ModelSettings, EvaluationSettings, SampleSettings),
        groups={},
        inputs=("policy",),
    ),
}

# TRL and transformers check little of a value's range, and late. These are the ones whose mistakes cost a run.
_TRAINER_RANGES: dict[str, dict[str, float]] = {
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

# Keys that change where or how often a run reports, never what it computes: no part of a stage's identity.
_UNKEYED = {
    "output_dir", "overwrite", "logging_steps", "logging_first_step", "logging_dir", "report_to", "run_name",
    "disable_tqdm", "save_steps", "save_strategy", "save_total_limit", "log_level", "generation_batch_size",
    "dataset_num_proc", "dataloader_num_workers",
}  # fmt: skip


@dataclass(frozen=True)
class StageConfig:
    """One stage's effective configuration: every value is checked, every key is known."""

    recipe: str
    values: Mapping[str, Any]  # flat keys: TRL's, and those of our parts
    groups: Mapping[str, Any]  # adapter, gates: instances of their dataclass
    inputs: Mapping[str, str]  # role -> run directory
    source: str  # the file it was read from, for messages

    def part(self, cls: type[T]) -> T:
        """The settings of one of our dataclasses, `config.part(DataSettings)`."""
        return cls(**{f.name: self.values[f.name] for f in dataclasses.fields(cls) if f.name in self.values})  # type: ignore[arg-type]

    @property
    def adapter(self) -> AdapterSettings:
        settings: AdapterSettings = self.groups["adapter"]
        return settings

    @property
    def gates(self) -> GateSettings:
        settings: GateSettings = self.groups["gates"]
        return settings

    @property
    def output_dir(self) -> Path:
        return Path(self.values["output_dir"])

    def trainer_values(self) -> dict[str, Any]:
        """The values that belong to TRL's configuration class."""
        known = fields_of(*trainer_class(self.recipe))
        return {k: v for k, v in self.values.items() if k in known}

    def to_dict(self) -> dict[str, Any]:
        """Everything, as it would be written in one YAML file."""
        flat = dict(sorted(self.values.items()))
        for name, group in self.groups.items():
            flat[name] = dataclasses.asdict(group)
        flat["inputs"] = dict(self.inputs)
        return flat

    def key_material(self) -> dict[str, Any]:
        """What this configuration adds to the stage's key: all that changes the result, nothing else."""
        kept = {k: v for k, v in self.to_dict().items() if k not in _UNKEYED and k != "inputs"}
        return {"recipe": self.recipe, **kept}

    def write(self, path: Path) -> None:
        path.write_text(yaml.safe_dump({"recipe": self.recipe, **self.to_dict()}, sort_keys=False), encoding="utf-8")


def trainer_class(recipe: str) -> tuple[str, str]:
    """Module and name of the configuration class of a recipe that trains."""
    trainer = RECIPES[recipe].trainer
    assert trainer is not None, recipe
    return trainer


def parse_args(recipe: str, argv: Sequence[str]) -> StageConfig:
    """Read `--config file.yaml [--key value]` for a recipe. Raises ConfigError."""
    overrides: dict[str, Any] = {}
    config_file: str | None = None
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r}; options are written --key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"--{key} has no value; write --{key} VALUE (true or false for a switch)")
            value = words.pop(0)
        if key == "config":
            config_file = value
        else:
            overrides[key] = _from_shell(value)
    document: Any = {}
    if config_file is not None:
        document = read_yaml(Path(config_file))
    return build(recipe, document, overrides, source=config_file or "the command line")


def _from_shell(text: str) -> Any:
    """Lists and mappings are written as YAML flow on the command line; everything else stays text for `coerce`."""
    if text[:1] in "[{" and text:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return text


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping. Raises ConfigError naming the file, and the line where it is broken."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file (looked in {Path.cwd()})") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a folder; a configuration is one YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, got {type(document).__name__}")
    return document


def build(
    recipe: str, document: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, *, source: str
) -> StageConfig:
    """Check a stage's keys and values and fill in the defaults. Raises ConfigError; imports nothing heavy."""
    if recipe not in RECIPES:
        raise ConfigError(f"{source}: unknown recipe {recipe!r}; known: {', '.join(RECIPES)}")
    spec = RECIPES[recipe]
    document = {k: v for k, v in document.items() if not (k == "recipe" and v == recipe)}
    given: dict[str, tuple[Any, str]] = {}  # dotted key -> value, where it was written
    for where, mapping in ((source, document), ("the command line", overrides or {})):
        for key, value in mapping.items():
            if key in spec.groups or key == "inputs":
                if not isinstance(value, Mapping):
                    raise ConfigError(f"{where}: {key} is a group; write `{key}: {{name: value}}`, got {value!r}")
                given.update({f"{key}.{k}": (v, where) for k, v in value.items()})
            else:
                given[str(key)] = (value, where)

    types = known_keys(recipe)
    ranges = _ranges(spec)

    checked: dict[str, Any] = {}
    for key, (value, where) in given.items():
        if key not in types:
            raise ConfigError(_unknown_key(key, types, where, recipe))
        checked[key] = _check(key, value, types[key], ranges.get(key, {}), where)

    values = {f.name: f.default for part in spec.parts for f in dataclasses.fields(part)} | dict(spec.defaults)
    values |= {k: v for k, v in checked.items() if "." not in k}
    groups = {
        name: cls(
            **{f.name: checked[f"{name}.{f.name}"] for f in dataclasses.fields(cls) if f"{name}.{f.name}" in checked}
        )
        for name, cls in spec.groups.items()
    }
    inputs = {k.removeprefix("inputs."): v for k, v in checked.items() if k.startswith("inputs.")}
    if not values.get("output_dir"):
        raise ConfigError(f"{source}: output_dir is missing; set it in the file or with --output_dir DIR")
    return StageConfig(recipe, values, groups, inputs, source)


def known_keys(recipe: str) -> dict[str, Any]:
    """Every key that a recipe's configuration knows, with its type; keys of a group are dotted."""
    if recipe not in RECIPES:
        raise ConfigError(f"unknown recipe {recipe!r}; known: {', '.join(RECIPES)}")
    spec = RECIPES[recipe]
    types = dict(fields_of(*spec.trainer)) if spec.trainer else {}
    for part in spec.parts:
        types.update(get_type_hints(part))
    for name, cls in spec.groups.items():
        types.update({f"{name}.{k}": t for k, t in get_type_hints(cls).items()})
    types.update({f"inputs.{role}": str for role in spec.inputs})
    return types


def _ranges(spec: Recipe) -> dict[str, Mapping[str, Any]]:
    ranges: dict[str, Mapping[str, Any]] = dict(_TRAINER_RANGES) if spec.trainer else {}
    for part in spec.parts:
        ranges.update({f.name: f.metadata for f in dataclasses.fields(part)})
    for name, cls in spec.groups.items():
        ranges.update({f"{name}.{f.name}": f.metadata for f in dataclasses.fields(cls)})
    return ranges


def _unknown_key(key: str, types: Mapping[str, Any], where: str, recipe: str) -> str:
    near = difflib.get_close_matches(key, types, n=1, cutoff=0.6)
    if not near:
        # `r: 8` at the top belongs into the group: look at the last word of each key as well.
        near = [known for known in types if "." in known and known.split(".")[-1] == key.split(".")[-1]][:1]
    hint = f"did you mean {near[0]!r}?" if near else f"`posttrain keys {recipe}` lists the {len(types)} known ones"
    return f"{where}: unknown key {key!r}; {hint}"


def _check(key: str, value: Any, type_: Any, limits: Mapping[str, Any], where: str) -> Any:
    try:
        value = coerce(value, type_)
    except ValueError as error:
        raise ConfigError(f"{where}: {key} must be {describe(type_)}, got {value!r}") from error
    if isinstance(value, str) and value.startswith("~/"):
        value = os.path.expanduser(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        accepted = []
        if "above" in limits:
            accepted.append(f"greater than {limits['above']}")
        if "min" in limits:
            accepted.append(f"at least {limits['min']}")
        if "max" in limits:
            accepted.append(f"at most {limits['max']}")
        fits = (
            value == value
            and ("above" not in limits or value > limits["above"])
            and ("min" not in limits or value >= limits["min"])
            and ("max" not in limits or value <= limits["max"])
        )
        if not fits:
            raise ConfigError(f"{where}: {key} must be {' and '.join(accepted)}, got {value!r}")
    return value


def digest(material: Any) -> str:
    """SHA-256 over the canonical JSON of `material`, in hexadecimal."""
    text = json.dumps(material, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()
