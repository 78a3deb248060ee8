"""The configuration of one stage: YAML and command line, merged and checked.

A stage's file is flat YAML. Its keys are the fields of TRL's class for that recipe (`learning_rate`, `beta`, ...), the
fields of the dataclasses in sections.py, and three groups: `adapter`, `gates` and `inputs`. The command line overrides
it with `--key value` and `--group.key value`. Nothing here imports torch: a typo is reported before anything heavy is
loaded.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from ..errors import ConfigError
from ..redact import redact_values
from .peft_methods import COMMAND_LINE, resolve
from .recipes import RECIPES, SHARED_RANGES, UNUSED, Recipe
from .schema import fields_of
from .sections import AdapterSettings, ModelSettings
from .split_rules import check_settings
from .values import check_value, flatten, read_yaml

# Keys that change where or how often a run reports, but not its result. They are not part of the stage's key.
UNKEYED = {
    "output_dir", "logging_steps", "logging_first_step", "logging_dir", "report_to", "run_name", "project",
    "wandb_mode", "wandb_entity", "wandb_artifacts", "disable_tqdm", "save_steps", "save_strategy", "save_total_limit",
    "log_level", "generation_batch_size", "dataset_num_proc", "dataloader_num_workers", "ddp_timeout", "ddp_backend",
    "tensor_parallel_size", "pipeline_parallel_size", "pipeline_schedule", "pipeline_micro_batches",
}  # fmt: skip

T = TypeVar("T")


@dataclass(frozen=True)
class StageConfig:
    """One stage's effective configuration: every value is checked, every key is known."""

    recipe: str
    values: Mapping[str, Any]  # flat keys: the trainer's, and those of sections.py
    groups: Mapping[str, Any]  # adapter, gates: instances of their dataclass
    inputs: Mapping[str, str]  # role -> run directory
    source: str  # the file that it was read from, for messages
    notes: tuple[str, ...] = ()  # where a default or a file was overruled

    def part(self, cls: type[T]) -> T:
        """The settings of one dataclass of sections.py: `config.part(DataSettings)`, `config.part(PolicyGates)`."""
        for group in self.groups.values():
            if isinstance(group, cls):
                return group
        return cls(**{f.name: self.values[f.name] for f in dataclasses.fields(cls) if f.name in self.values})  # type: ignore[arg-type]

    @property
    def adapter(self) -> AdapterSettings:
        settings: AdapterSettings = self.groups["adapter"]
        return settings

    @property
    def output_dir(self) -> Path:
        return Path(self.values["output_dir"])

    def trainer_values(self) -> dict[str, Any]:
        """The values that belong to the trainer's configuration class."""
        known = fields_of(*trainer_class(self.recipe))
        return {k: v for k, v in self.values.items() if k in known}

    def to_dict(self) -> dict[str, Any]:
        """The whole configuration, as in one YAML file."""
        flat = dict(sorted(self.values.items()))
        for name, group in self.groups.items():
            flat[name] = dataclasses.asdict(group)
        flat["inputs"] = dict(self.inputs)
        return flat

    def key_material(self) -> dict[str, Any]:
        """What goes into the stage's key: all that changes the result, and nothing else."""
        kept = {k: v for k, v in self.to_dict().items() if k not in UNKEYED and k != "inputs"}
        return {"recipe": self.recipe, **kept}

    def write(self, path: Path) -> None:
        """Write one YAML file without secrets, since it is shared together with the result."""
        document = redact_values({"recipe": self.recipe, **self.to_dict()})
        path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def changed_keys(recorded: Mapping[str, Any], config: StageConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value then, value now), for keys of the stage's key whose recorded value differs.

    `recorded` is the `config` of a lineage.
    """
    then, now = (flatten(redact_values(c)) for c in (recorded, config.to_dict()))
    return {
        key: (then.get(key), value)
        for key, value in now.items()
        if key.partition(".")[0] not in {*UNKEYED, "inputs"} and _as_json(then.get(key)) != _as_json(value)
    }


def _as_json(value: Any) -> str:
    return json.dumps(value, default=str)


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
    """Read lists and mappings, which are written as YAML flow on the command line; all else stays text for `coerce`."""
    if text[:1] in "[{" and text:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return text


def build(
    recipe: str, document: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, *, source: str
) -> StageConfig:
    """Check a stage's keys and values and fill in the defaults. Raises ConfigError; imports nothing heavy."""
    if recipe not in RECIPES:
        raise ConfigError(f"{source}: unknown recipe {recipe!r}; known: {', '.join(RECIPES)}")
    spec = RECIPES[recipe]
    document = {k: v for k, v in document.items() if not (k == "recipe" and v == recipe)}
    given: dict[str, tuple[Any, str]] = {}  # dotted key -> value, where it was written
    for where, mapping in ((source, document), (COMMAND_LINE, overrides or {})):
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
        checked[key] = check_value(key, value, types[key], ranges.get(key, {}), where)

    values = {f.name: f.default for part in spec.sections for f in dataclasses.fields(part)} | dict(spec.defaults)
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
    if spec.trainer is None and "policy" in inputs:
        _check_untrained(recipe, {key: where for key, (_, where) in given.items()})
    notes: list[str] = []
    if "adapter" in groups:
        written = {key: where for key, (_, where) in given.items()}
        groups["adapter"], notes = resolve(
            recipe, groups["adapter"], values, given=written, has_policy="policy" in inputs
        )
        check_settings(recipe, values, groups["adapter"])
    return StageConfig(recipe, values, groups, inputs, source, tuple(notes))


def _check_untrained(recipe: str, written: Mapping[str, str]) -> None:
    """Refuse model settings of a stage that only uses a policy, loaded as it was trained. Raises ConfigError."""
    for name in sorted({f.name for f in dataclasses.fields(ModelSettings)} - {"model_name_or_path"}):
        if name in written:
            raise ConfigError(
                f"{written[name]}: {name} does nothing in {recipe} with inputs.policy, which is loaded as it was "
                "trained; leave it out"
            )


def known_keys(recipe: str) -> dict[str, Any]:
    """Every key of a recipe's configuration, with its type; keys of a group are dotted."""
    if recipe not in RECIPES:
        raise ConfigError(f"unknown recipe {recipe!r}; known: {', '.join(RECIPES)}")
    spec = RECIPES[recipe]
    types = {k: t for k, t in fields_of(*spec.trainer).items() if k not in UNUSED} if spec.trainer else {}
    for part in spec.sections:
        types.update(get_type_hints(part))
    for name, cls in spec.groups.items():
        types.update({f"{name}.{k}": t for k, t in get_type_hints(cls).items()})
    types.update({f"inputs.{role}": str for role in spec.inputs})
    return types


def _ranges(spec: Recipe) -> dict[str, Mapping[str, Any]]:
    ranges: dict[str, Mapping[str, Any]] = {**SHARED_RANGES, **spec.ranges} if spec.trainer else {}
    for part in spec.sections:
        ranges.update({f.name: f.metadata for f in dataclasses.fields(part)})
    for name, cls in spec.groups.items():
        ranges.update({f"{name}.{f.name}": f.metadata for f in dataclasses.fields(cls)})
    return ranges


def _unknown_key(key: str, types: Mapping[str, Any], where: str, recipe: str) -> str:
    if key in UNUSED:
        return f"{where}: {key} does nothing here: {UNUSED[key]}"
    others = [name for name in RECIPES if key in known_keys(name)]
    if others:
        return f"{where}: unknown key {key!r}; it is a key of {', '.join(others)}, and {recipe} has no use for it"
    near = difflib.get_close_matches(key, types, n=1, cutoff=0.6)
    if not near:
        # `r: 8` at the top level belongs into a group: compare the last part of each key as well.
        near = [known for known in types if "." in known and known.split(".")[-1] == key.split(".")[-1]][:1]
    hint = f"did you mean {near[0]!r}?" if near else f"`posttrain keys {recipe}` lists the {len(types)} known ones"
    return f"{where}: unknown key {key!r}; {hint}"
