"""What is decided before anything is loaded: a setting is refused with the reason, changed with a note, or used."""

import dataclasses
import subprocess
import sys

import pytest

from conftest import edit
from posttrain.chain.graph import read_chain
from posttrain.config.peft_methods import METHODS, check_takeover
from posttrain.config.recipes import RECIPES
from posttrain.config.sections import AdapterSettings
from posttrain.config.stage_config import build
from posttrain.errors import ConfigError


def stage(recipe="sft", overrides=None, **document):
    return build(recipe, {"output_dir": "x", **document}, overrides, source="stage.yaml")


def test_the_table_and_the_settings_name_the_same_methods():
    accepted = AdapterSettings.__dataclass_fields__["method"].type
    assert set(METHODS) == set(accepted.__args__)
    fields = {f.name for f in dataclasses.fields(AdapterSettings)}
    assert all(method.reads <= fields for method in METHODS.values())
    for method in METHODS.values():
        assert set(method.refused) <= set(RECIPES)
        assert all(
            nearest in METHODS and task not in METHODS[nearest].refused for task, (_, nearest) in method.refused.items()
        )


def test_a_key_that_the_method_does_not_use_is_refused_when_written_with_it():
    with pytest.raises(ConfigError, match=r"stage.yaml: ia3 does not use adapter.r, only modules_to_save, targ"):
        stage(adapter={"method": "ia3", "r": 8})


def test_keys_of_a_file_are_dropped_with_a_note_when_the_command_line_names_another_method():
    config = stage(adapter={"method": "lora", "r": 8, "alpha": 4}, overrides={"adapter.method": "ia3"})
    assert (config.adapter.r, config.adapter.alpha) == (16, 32)
    assert config.notes == (
        "adapter.r of stage.yaml is left out: ia3 does not use it",
        "adapter.alpha of stage.yaml is left out: ia3 does not use it",
    )
    kept = stage(adapter={"method": "lora", "r": 8}, overrides={"adapter.method": "dora"})
    assert (kept.adapter.r, kept.notes) == (8, ())


def test_prefix_tuning_switches_gradient_checkpointing_off():
    config = stage(adapter={"method": "p_tuning_v2"})
    assert config.trainer_values()["gradient_checkpointing"] is False
    assert config.notes == (
        "gradient_checkpointing is off: the prefix is in the key-value cache, which checkpointing does not use",
    )
    assert stage(adapter={"method": "p_tuning_v2"}, gradient_checkpointing=False).notes == ()
    assert "gradient_checkpointing" not in stage(adapter={"method": "lora"}).values
    with pytest.raises(ConfigError, match=r"stage.yaml: gradient_checkpointing: true does not work with prefix_tuning"):
        stage(adapter={"method": "prefix_tuning"}, gradient_checkpointing=True)


@pytest.mark.parametrize("method", ["pissa", "olora", "adalora"])
def test_a_method_that_cannot_continue_merges_its_input(method):
    config = stage("dpo", adapter={"method": method}, inputs={"policy": "sft"})
    assert config.adapter.start == "merge"
    assert [note[:44] for note in config.notes] == [f"adapter.start is merge, not continue, for {method}"[:44]]
    with pytest.raises(ConfigError, match=f"stage.yaml: adapter.start: continue is wrong for {method}"):
        stage("dpo", adapter={"method": method, "start": "continue"}, inputs={"policy": "sft"})
    assert stage("sft", adapter={"method": method}).adapter.start == "continue"  # there is nothing to merge


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if not m.identity and "dpo" in m.tasks])
def test_dpo_refuses_a_fresh_adapter_that_changes_the_policy(method):
    assert stage("dpo", adapter={"method": method}, inputs={"policy": "sft"}).adapter.start == "continue"
    for inputs, start in (({}, "continue"), ({"policy": "sft"}, "merge")):
        with pytest.raises(ConfigError, match=f"adapter.method: a fresh {method} adapter changes the policy"):
            stage("dpo", adapter={"method": method, "start": start}, inputs=inputs)


def test_four_bit_weights_are_refused_for_methods_that_cannot_train_on_them():
    assert stage(adapter={"method": "dora"}, load_in_4bit=True).notes == ()
    with pytest.raises(ConfigError, match="pissa does not train on 4-bit weights; use lora"):
        stage(adapter={"method": "pissa"}, load_in_4bit=True)


def test_precomputed_references_are_refused_when_trls_copy_is_incomplete():
    given = {"inputs": {"policy": "sft"}, "precompute_ref_log_probs": True}
    assert stage("dpo", adapter={"method": "lora"}, **given).values["precompute_ref_log_probs"]
    assert stage("dpo", adapter={"method": "ia3", "start": "merge"}, **given).adapter.start == "merge"
    for method in ("ia3", "vera", "boft", "loha", "lokr"):
        with pytest.raises(ConfigError, match=f"before the reference of {method} is complete"):
            stage("dpo", adapter={"method": method}, **given)


def test_load_best_model_at_end_is_refused_for_virtual_tokens():
    assert stage(adapter={"method": "lora"}, load_best_model_at_end=True).values["load_best_model_at_end"]
    with pytest.raises(ConfigError, match="load_best_model_at_end: PEFT reads a checkpoint of p_tuning into the wrong"):
        stage(adapter={"method": "p_tuning"}, load_best_model_at_end=True)


def test_vllm_is_refused_for_an_adapter_that_cannot_be_merged():
    assert stage("ppo", adapter={"method": "ia3"}, use_vllm=True).values["use_vllm"]
    with pytest.raises(ConfigError, match=r"use_vllm: .* merged into its base, and bottleneck cannot be merged"):
        stage("ppo", adapter={"method": "bottleneck"}, use_vllm=True)


def made_with(method, **more):
    return dataclasses.asdict(AdapterSettings(method=method, **more))


def test_compatible_adapters_pass_check_takeover():
    check_takeover("runs/sft", made_with("lora"), AdapterSettings())
    check_takeover("runs/sft", made_with("lora", r=4), AdapterSettings(method="ia3", start="merge"))
    check_takeover("runs/sft", made_with("lora", dropout=0.1), AdapterSettings())
    check_takeover("runs/sft", made_with("none"), AdapterSettings(method="bottleneck"))
    check_takeover("runs/sft", made_with("lora", target_modules=["q_proj"]), AdapterSettings())


@pytest.mark.parametrize(
    ("parent", "child", "message"),
    [
        ({"method": "lora"}, {"method": "dora"}, "method is dora, but .* is lora; set .*, or adapter.start: merge"),
        ({"method": "lora", "r": 8}, {}, "adapter.r is 16, but .* whose r is 8"),
        ({"method": "lora"}, {"target_modules": ["q"]}, r"adapter.target_modules is \['q'\], but .* is None"),
        ({"method": "bottleneck"}, {"start": "merge"}, "bottleneck, which cannot be merged .*; continue with adapter:"),
        ({"method": "p_tuning"}, {"start": "merge"}, "p_tuning, which cannot be merged .* base; train it with lora"),
        ({"method": "p_tuning"}, {"method": "p_tuning"}, "another stage cannot continue; and it cannot be merged"),
        ({"method": "bottleneck"}, {"method": "none"}, "bottleneck, which cannot be merged"),
        ({"method": "pissa"}, {}, "pissa, which another stage cannot continue; use adapter.start: merge"),
    ],
)  # fmt: skip
def test_incompatible_adapters_are_refused_by_check_takeover(parent, child, message):
    with pytest.raises(ConfigError, match=message):
        check_takeover("runs/sft", made_with(**parent), AdapterSettings(**child))


def test_a_chain_with_incompatible_adapters_is_refused_when_read(chain):
    edit(chain.parent / "sft.yaml", "adapter: {r: 4, alpha: 8}", "adapter: {method: bottleneck, reduction_factor: 4}")
    with pytest.raises(ConfigError, match=r"stages.dpo: its input sft|stages.reward: its input sft"):
        read_chain(chain)


def test_importing_posttrain_registers_the_bottleneck_with_peft():
    """In either order of imports; and `import posttrain` alone does not import PEFT."""
    check = "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as m; assert 'BOTTLENECK' in m"
    for code in (f"import posttrain; {check}", f"import peft, posttrain; {check}"):
        subprocess.run([sys.executable, "-c", code], check=True)
    subprocess.run([sys.executable, "-c", "import posttrain, sys; assert 'peft' not in sys.modules"], check=True)
