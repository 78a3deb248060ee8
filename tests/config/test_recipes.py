"""The table of recipes: each row is correct, and a key that a recipe does not use is refused."""

import importlib

import pytest

from conftest import ROOT
from posttrain.config.recipes import RECIPES, SHARED_RANGES, UNUSED
from posttrain.config.schema import fields_of
from posttrain.config.stage_config import build, known_keys
from posttrain.data.rows import FORMATS
from posttrain.errors import ConfigError

TRAINED = [name for name, recipe in RECIPES.items() if recipe.trainer is not None]


def make(recipe, **document):
    return build(recipe, {"output_dir": "o", **document}, source="x.yaml")


def test_the_table_has_one_row_per_script():
    assert {path.stem for path in (ROOT / "recipes").glob("*.py")} == set(RECIPES)


@pytest.mark.parametrize("name", TRAINED)
def test_keys_read_from_source_are_the_fields_of_the_imported_class(name):
    """The keys read from the class's source, without importing it, equal the fields of the imported class."""
    recipe = RECIPES[name]
    module, class_name = recipe.trainer
    cls = getattr(importlib.import_module(module), class_name)
    fields = {f for f in cls.__dataclass_fields__ if not f.startswith("_")}
    assert fields_of(module, class_name).keys() == fields
    assert fields - UNUSED.keys() <= known_keys(name).keys()
    assert recipe.ranges.keys() <= fields
    assert recipe.defaults.keys() <= fields


def test_shared_ranges_and_unused_keys_exist_in_a_trainer():
    everything = set().union(*(fields_of(*RECIPES[name].trainer) for name in TRAINED))
    assert SHARED_RANGES.keys() <= everything
    assert UNUSED.keys() <= everything


@pytest.mark.parametrize("name", RECIPES)
def test_formats_inputs_and_measures_are_known(name):
    recipe = RECIPES[name]
    assert set(recipe.formats) <= {*FORMATS}
    assert set(recipe.inputs) <= {"policy", "reward", "data"}
    assert recipe.title and recipe.label and recipe.measures
    assert bool(recipe.panels) == (recipe.trainer is not None)
    assert recipe.measures[0].headline


@pytest.mark.parametrize(
    ("recipe", "key", "value"),
    [
        ("evaluate", "num_samples", 8), ("evaluate", "temperature", 0.5), ("evaluate", "top_p", 0.5),
        ("evaluate", "verifier", "exact_match"), ("evaluate", "pairs_per_prompt", 2), ("evaluate", "train_file", "x"),
        ("evaluate", "validation_share", 0.2), ("evaluate", "overwrite", True), ("sample", "overwrite", True),
        ("sample", "test_file", "x"), ("sample", "test_rows", 8), ("sample", "test_samples", 2),
        ("sample", "validation_file", "x"), ("sample", "dataset_test_split", "test"), ("reward", "max_new_tokens", 4),
        ("sft", "gates", {"f1": 0.5}), ("dpo", "gates", {"reward_accuracy": 0.5}), ("reward", "gates", {"stops": 0.5}),
        ("ner", "gates", {"stops": 0.5}), ("ppo", "tensor_parallel_size", 2),
    ],
)  # fmt: skip
def test_a_key_that_a_recipe_does_not_use_is_refused(recipe, key, value):
    with pytest.raises(ConfigError, match=f"unknown key '{key}"):
        make(recipe, **{key: value})


@pytest.mark.parametrize("recipe", TRAINED)
@pytest.mark.parametrize("key", ["resume_from_checkpoint", "do_train", "local_rank"])
def test_a_trainer_key_that_no_recipe_uses_is_refused_with_the_alternative(recipe, key):
    with pytest.raises(ConfigError, match=f"{key} does nothing here: {UNUSED[key]}"):
        make(recipe, **{key: "1"})
    assert key not in known_keys(recipe)


@pytest.mark.parametrize("recipe", ["sample", "evaluate"])
@pytest.mark.parametrize(
    ("key", "value"), [("dtype", "bfloat16"), ("load_in_4bit", True), ("attn_implementation", "sdpa")]
)
def test_model_settings_are_refused_beside_an_input_policy(recipe, key, value):
    make(recipe, **{key: value})  # without an input policy the key is used
    with pytest.raises(ConfigError, match=f"x.yaml: {key} does nothing in {recipe} with inputs.policy"):
        make(recipe, inputs={"policy": "runs/sft"}, **{key: value})
