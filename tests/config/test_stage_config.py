"""The schema read from source equals TRL's, and every invalid key or value is refused with what to change."""

import dataclasses
import subprocess
import sys
import time

import pytest

from posttrain.config import stage_config, values
from posttrain.config.schema import coerce, fields_of
from posttrain.errors import ConfigError


@pytest.mark.parametrize("name", ["SFTConfig", "RewardConfig", "DPOConfig"])
def test_fields_are_those_of_the_imported_class(name):
    import trl

    module = {"SFTConfig": "sft", "RewardConfig": "reward", "DPOConfig": "dpo"}[name]
    oracle = {f.name for f in dataclasses.fields(getattr(trl, name)) if f.init and not f.name.startswith("_")}
    assert set(fields_of(f"trl.trainer.{module}_config", name)) == oracle
    assert len(oracle) > 100


def build(recipe="sft", **document):
    return stage_config.build(recipe, {"output_dir": "out", **document}, source="stage.yaml")


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"learning_rat": 1}, r"stage.yaml: unknown key 'learning_rat'; did you mean 'learning_rate'\?"),
        ({"r": 8}, r"unknown key 'r'; did you mean 'adapter.r'\?"),
        ({"adapter": {"rank": 8}}, r"unknown key 'adapter.rank'"),
        ({"adapter": 8}, r"adapter is a group"),
        ({"learning_rate": "fast"}, r"learning_rate must be a number, got 'fast'"),
        ({"learning_rate": 0}, r"learning_rate must be greater than 0, got 0.0"),
        ({"per_device_train_batch_size": 0.5}, r"per_device_train_batch_size must be an integer, got 0.5"),
        ({"gradient_checkpointing": 1}, r"gradient_checkpointing must be"),
        ({"adapter": {"dropout": 1.5}}, r"adapter.dropout must be at least 0 and at most 0.99, got 1.5"),
        (
            {"adapter": {"method": "lore"}},
            r"adapter.method must be one of lora, rslora, dora, pissa, .*none, got 'lore'",
        ),
        ({"learning_rate": float("nan")}, r"learning_rate must be greater than 0, got nan"),
    ],
)
def test_an_invalid_config_is_refused_with_the_key_and_file(document, expected):
    with pytest.raises(ConfigError, match=expected):
        build(**document)


def test_text_from_yaml_and_shell_becomes_numbers():
    made = stage_config.parse_args(
        "sft", ["--output_dir", "o", "--learning_rate", "1e-3", "--adapter.r=8", "--gradient_checkpointing", "false"]
    )
    assert made.values["learning_rate"] == 1e-3
    assert made.adapter.r == 8
    assert made.values["gradient_checkpointing"] is False


def test_command_line_overrides_the_file(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("output_dir: a\nadapter: {r: 4, alpha: 8}\nlearning_rate: 1e-3\n")
    made = stage_config.parse_args("sft", ["--config", str(file), "--adapter.r", "2"])
    assert (made.adapter.r, made.adapter.alpha, made.values["learning_rate"]) == (2, 8.0, 1e-3)


@pytest.mark.parametrize("value", [True, "x", None, 1.5])
def test_a_value_that_is_not_an_integer_is_refused(value):
    with pytest.raises(ValueError, match="integer"):
        coerce(value, int)


def test_reporting_keys_do_not_change_the_key_material():
    assert build(logging_steps=1).key_material() == build(logging_steps=7).key_material()
    assert build(learning_rate=1e-3).key_material() != build(learning_rate=2e-3).key_material()


def test_broken_yaml_is_reported_with_its_line(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("a: 1\nb: [\n")
    with pytest.raises(ConfigError, match=r"s.yaml: not readable as YAML.*line 3"):
        values.read_yaml(file)


def test_checking_a_config_imports_no_torch():
    code = (
        "import sys; from posttrain import cli; from posttrain.config import stage_config\n"
        "from posttrain.chain import run, slurm_jobs; from posttrain.data import rows\n"
        "stage_config.build('dpo', {'output_dir': 'o', 'beta': 0.2}, source='x')\n"
        "assert not {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_answers_within_seconds():
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "posttrain.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "run a chain" in done.stdout
    assert time.monotonic() - begun < 5  # a guard against an import of torch; benchmarks measure the 0.3 s


def test_none_stays_text_and_null_becomes_none():
    found = stage_config.parse_args("sft", ["--output_dir", "o", "--report_to", "none", "--max_length", "null"])
    assert found.values["report_to"] == "none"
    assert found.values["max_length"] is None
