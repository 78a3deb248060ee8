"""What a split model cannot do is refused by its configuration, its launch or its model, before weights are read."""

import json

import pytest
from transformers import AutoConfig

from posttrain.config.stage_config import build
from posttrain.distributed.checkpoints import WRITTEN_BY, check_resumable
from posttrain.distributed.environment import Launch
from posttrain.distributed.split.layout import Layout, read_layout
from posttrain.distributed.split.trainer import split
from posttrain.errors import ConfigError, LaunchError

BOTH = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}


def settings(recipe="sft", **values):
    values = {"per_device_train_batch_size": 8, "output_dir": "out", **BOTH, **values}
    return build(recipe, values, source="x.yaml")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"adapter": {"method": "dora"}}, "adapter.method: dora .* use lora, rslora, none"),
        ({"adapter": {"method": "ia3"}}, "adapter.method: ia3"),
        ({"adapter": {"dropout": 0.1}}, "adapter.dropout: 0.1 .* set it to 0"),
        ({"adapter": {"modules_to_save": ["lm_head"]}}, "adapter.modules_to_save"),
        ({"adapter": {"target_modules": ["q_proj", "lm_head"]}}, "adapter.target_modules: lm_head"),
        ({"adapter": {"target_modules": "embed_tokens"}}, "adapter.target_modules: embed_tokens"),
        ({"load_in_4bit": True}, "load_in_4bit: true .*ddp.yaml"),
        ({"packing": True}, "packing: True .* leave it out"),
        ({"padding_free": True}, "padding_free"),
        ({"fp16": True}, "fp16"),
        ({"torch_compile": True}, "torch_compile"),
        ({"activation_offloading": True}, "activation_offloading"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"eval_strategy": "steps"}, "eval_strategy: steps .* test_file is measured at the end"),
        ({"optim": "adafactor"}, "optim: adafactor .* use adamw_torch"),
        ({"loss_type": "dft"}, "loss_type: dft .* use nll"),
        ({"pipeline_micro_batches": 3}, "3 does not divide per_device_train_batch_size: 8"),
        ({"pipeline_micro_batches": 1}, "1f1b needs as many micro-batches as stages"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1"),
        ({"pipeline_schedule": "zero_bubble"}, "pipeline_schedule must be"),
    ],
)
def test_a_configuration_is_refused(values, says):
    with pytest.raises(ConfigError, match=says):
        settings(**values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"loss_type": ["sigmoid", "aot"]}, "loss_type: aot .* use apo_down"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs"),
        ({"sync_ref_model": True}, "sync_ref_model"),
        ({"use_weighting": True}, "use_weighting"),
    ],
)
def test_a_dpo_configuration_is_refused(values, says):
    with pytest.raises(ConfigError, match=says):
        settings("dpo", **values)


@pytest.mark.parametrize("recipe", ["reward", "ppo", "ner"])
def test_other_recipes_do_not_know_the_keys_and_say_which_do(recipe):
    with pytest.raises(ConfigError, match="'tensor_parallel_size'; it is a key of sft, dpo"):
        settings(recipe, pipeline_parallel_size=1)


def test_an_unsplit_model_has_no_restrictions():
    settings(tensor_parallel_size=1, pipeline_parallel_size=1, packing=True, optim="adafactor")


def test_a_layout_does_not_change_the_stages_key():
    assert settings().key_material() == settings(tensor_parallel_size=1, pipeline_schedule="gpipe").key_material()


@pytest.fixture
def launched(monkeypatch):
    def launch(processes, **env):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        for name, value in env.items():
            monkeypatch.setenv(name, value)

    return launch


@pytest.fixture
def base(tmp_path):
    """A model's configuration, and no weights."""

    def make(model_type="llama", **values):
        config = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}
        AutoConfig.for_model(model_type, **config, **values).save_pretrained(tmp_path)
        return str(tmp_path)

    return make


def test_the_remaining_processes_are_data_parallel_copies(launched, base):
    launched(8)
    assert read_layout(settings(), base()) == Layout(2, 2, 2, "1f1b", 4)
    launched(2)
    assert read_layout(settings(pipeline_parallel_size=1), base()) == Layout(1, 1, 2, "1f1b", 4)


def test_without_a_layout_split_returns_the_trainer_class(launched):
    launched(2)
    layout = read_layout(settings(tensor_parallel_size=1, pipeline_parallel_size=1), "nowhere")
    assert layout is None
    assert split(dict, layout) is dict


@pytest.mark.parametrize("processes", [1, 2, 6])
def test_processes_that_do_not_fit_are_refused(launched, base, processes):
    launched(processes)
    with pytest.raises(LaunchError, match=f"a multiple of 4 processes, {processes} were launched"):
        read_layout(settings(), base())


@pytest.mark.parametrize("flag", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_deepspeed_or_fsdp_with_a_split_model_is_refused(launched, base, flag):
    launched(4, **{flag: "true"})
    with pytest.raises(LaunchError, match="would split it again"):
        read_layout(settings(), base())


@pytest.mark.parametrize(
    ("model", "keys", "says"),
    [
        ({"model_type": "qwen3"}, {}, "a qwen3 is not proven .* llama, mistral, qwen2"),
        ({}, {"tensor_parallel_size": 8, "pipeline_parallel_size": 1}, "num_key_value_heads.* 1, 2, 4 do"),
        ({"attention_dropout": 0.1}, {}, "attention_dropout: 0.1 in its config.json"),
        ({"intermediate_size": 129}, {}, "2 does not divide intermediate_size, which is 129"),
        ({}, {"tensor_parallel_size": 1, "pipeline_parallel_size": 4}, "4 stages, .* has 2 layers"),
    ],
)  # fmt: skip
def test_a_model_that_the_layout_cannot_split_is_refused(launched, base, model, keys, says):
    launched(8)
    with pytest.raises(ConfigError, match=says):
        read_layout(settings(**keys), base(**{"intermediate_size": 128, **model}))


ONE, DDP = Launch(1, "one"), Launch(2, "ddp")
SPLIT, BLOOM = Launch(2, "ddp", split=2), Launch(8, "ddp", split=4)


@pytest.mark.parametrize(
    ("wrote", "now"), [(ONE, SPLIT), (SPLIT, ONE), (DDP, BLOOM), (BLOOM, Launch(4, "ddp", split=2))]
)
def test_a_checkpoint_resumes_with_as_many_copies(tmp_path, wrote, now):
    (tmp_path / WRITTEN_BY).write_text(json.dumps(wrote.to_dict()))
    check_resumable(tmp_path, now)


@pytest.mark.parametrize(
    ("wrote", "now", "says"),
    [
        (DDP, SPLIT, "another number of rows"),
        (SPLIT, BLOOM, "another number of rows"),
        (Launch(2, "zero2"), BLOOM, "weights and optimizer are in other files"),
    ],
)
def test_a_checkpoint_of_other_copies_or_files_is_refused(tmp_path, wrote, now, says):
    (tmp_path / WRITTEN_BY).write_text(json.dumps(wrote.to_dict()))
    with pytest.raises(LaunchError, match=says):
        check_resumable(tmp_path, now)
