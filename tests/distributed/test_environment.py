"""A process trains as its launch asked for, or is refused before it has loaded anything."""

import json
from pathlib import Path
from unittest import mock

import pytest

from conftest import ROOT
from distributed.cells import CONFIGS
from posttrain.distributed import checkpoints
from posttrain.distributed.checks import check_wrapped
from posttrain.distributed.environment import Launch, check_launch, launch_of
from posttrain.distributed.rendezvous import _difference, meet, share_folder
from posttrain.errors import ConfigError, LaunchError
from posttrain.launch import accelerate_environment

TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}


@pytest.mark.parametrize("config", CONFIGS)
def test_each_configuration_is_recognised(config):
    """From the environment that accelerate itself makes of the file."""
    launch = launch_of({**accelerate_environment(ROOT / "accelerate_configs" / f"{config}.yaml"), **TWO})
    assert launch.strategy == config.partition("_")[0] and launch.processes == 2
    assert launch.offload == {"zero2_offload": "optimizer", "zero3_offload": "optimizer+parameters"}.get(config, "")


def test_without_a_launcher_it_is_one_process():
    assert launch_of({}) == Launch(1, "one")
    assert check_launch("evaluate", environ={}) == Launch(1, "one")


def single_environment(tmp_path, distributed_type, processes):
    """The environment that accelerate's single-process launcher makes of a configuration."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    file = tmp_path / "config.yaml"
    file.write_text(
        f"compute_environment: LOCAL_MACHINE\ndistributed_type: {distributed_type}\nuse_cpu: true\nnum_machines: 1\n"
        f"num_processes: {processes}\nmixed_precision: 'no'\n"
    )
    args = launch_command_parser().parse_args(["--config_file", str(file), "script.py"])
    with mock.patch.dict("os.environ", clear=True):
        return prepare_simple_launcher_cmd_env(_validate_launch_command(args)[0])[1]


@pytest.mark.parametrize("kind", ["MULTI_CPU", "'NO'"])
def test_one_process_of_a_configuration_of_two_is_refused(tmp_path, kind):
    with pytest.raises(LaunchError, match="asks for several processes, and accelerate started one"):
        check_launch("sft", environ=single_environment(tmp_path, kind, 2))
    assert check_launch("sft", environ=single_environment(tmp_path, kind, 1)).strategy == "one"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4"}, "4 processes were started"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "2 processes were started"),
        ({**TWO, "ACCELERATE_USE_MEGATRON_LM": "true"}, "MEGATRON_LM is not supported"),
        ({**TWO, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version must be 2"),
        ({**TWO, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "ds.json"),
        ({**TWO, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "true"}, "leave DeepSpeed out"),
    ],
)
def test_launches_that_accelerate_would_ignore_are_refused(environ, message):
    with pytest.raises(LaunchError, match=message):
        check_launch("sft", environ=environ)


def test_evaluate_is_refused_on_several_processes():
    with pytest.raises(LaunchError, match="evaluate works in one process"):
        check_launch("evaluate", environ=TWO)


def test_a_model_without_its_wrapper_is_refused():
    from torch import nn

    bare = nn.Linear(2, 2)
    with pytest.raises(LaunchError, match="bare Linear"):
        check_wrapped(bare, Launch(2, "ddp"))
    for strategy in ("zero0", "zero3", "fsdp2"):
        with pytest.raises(LaunchError, match=strategy):
            check_wrapped(bare, Launch(2, strategy))
    check_wrapped(bare, Launch(1, "one"))
    with pytest.raises(LaunchError, match="DataParallel"):
        check_wrapped(nn.DataParallel(bare), Launch(1, "one"))


def test_the_rank_that_differs_is_named():
    everyone = [{"_host": "a", "seed": 1}, {"_host": "b", "seed": 1}, {"_host": "c", "seed": 2}]
    assert _difference("seed", everyone) == ["  seed: 1 on ranks 0, 1 (a); 2 on rank 2 (c)"]
    assert _difference("seed", everyone[:2]) == []


def test_a_machine_that_does_not_see_output_dir_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("posttrain.distributed.rendezvous.FOLDER_S", 0.2)
    share_folder(tmp_path, timeout_s=1)
    with pytest.raises(LaunchError, match=r"run is not there on \S+; all machines must share"):
        share_folder(tmp_path / "run", timeout_s=1)


def test_a_single_process_needs_no_rendezvous():
    assert meet({"seed": 1}, timeout_s=1)[0]["seed"] == 1


@pytest.mark.parametrize(
    ("wrote", "now", "why"),
    [
        (Launch(2, "ddp"), Launch(1, "one"), "another number of rows"),
        (Launch(2, "zero2"), Launch(4, "zero2"), "another number of rows"),
        (Launch(2, "zero2"), Launch(2, "zero3"), "weights and optimizer are in other files"),
        (Launch(2, "ddp"), Launch(2, "fsdp2"), "weights and optimizer are in other files"),
    ],
)
def test_a_checkpoint_of_another_layout_is_refused(tmp_path, wrote, now, why):
    (tmp_path / checkpoints.WRITTEN_BY).write_text(json.dumps(wrote.to_dict()))
    with pytest.raises(LaunchError, match=why):
        checkpoints.check_resumable(tmp_path, now)
    checkpoints.check_resumable(tmp_path, wrote)


def test_a_checkpoint_resumes_under_another_split_of_a_copy(tmp_path):
    (tmp_path / checkpoints.WRITTEN_BY).write_text(json.dumps(Launch(4, "ddp", split=2).to_dict()))
    checkpoints.check_resumable(tmp_path, Launch(2, "ddp"))
    checkpoints.check_resumable(tmp_path, Launch(8, "ddp", split=4))
    with pytest.raises(LaunchError, match="another number of rows"):
        checkpoints.check_resumable(tmp_path, Launch(4, "ddp"))


def test_a_chain_refuses_a_configuration_that_starts_one_process(tmp_path):
    from posttrain.launch import check_config

    file = tmp_path / "cpu2.yaml"
    file.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    with pytest.raises(LaunchError, match="MULTI_GPU, on CPUs too"):
        check_config(file)
    for shipped in (ROOT / "accelerate_configs").glob("*.yaml"):
        check_config(shipped)


def test_mixed_precision_of_the_launcher_decides(monkeypatch):
    from posttrain.models import precision

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert precision.decide({"bf16": None, "use_cpu": True})["bf16"] is True
    for said in ({"bf16": False}, {"bf16": None, "fp16": True}):
        with pytest.raises(ConfigError, match="say it once"):
            precision.decide(said)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ConfigError, match="fp16: true needs a GPU"):
        precision.decide({"bf16": None, "use_cpu": True})
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ConfigError, match="fp8 is not supported"):
        precision.decide({"bf16": None})


def test_each_configuration_begins_with_a_comment_on_when_to_use_it():
    for file in (ROOT / "accelerate_configs").glob("*.yaml"):
        assert file.read_text().startswith("# "), file
        assert all(len(line) <= 120 for line in file.read_text().splitlines()), file


def test_a_recipe_without_its_launcher_is_refused_before_torch(tmp_path):
    """A real process: one second, no traceback, exit code 2."""
    from conftest import run_recipe

    done = run_recipe(
        "sft", "--model_name_or_path", "none", "--train_file", "none.jsonl", "--output_dir", tmp_path / "run",
        expect=2, env={"SLURM_STEP_NUM_TASKS": "2"}, fresh=True,
    )  # fmt: skip
    assert "LaunchError: 2 processes were started" in done.stderr and "Traceback" not in done.stderr
    assert not Path(tmp_path / "run").exists()
