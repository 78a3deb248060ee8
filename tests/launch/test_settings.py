"""The launch settings of a chain, and what is refused before anything is submitted."""

import re
import subprocess
import sys

import pytest

from conftest import edit
from posttrain.chain.graph import read_chain
from posttrain.errors import ConfigError, LaunchError
from posttrain.launch.settings import check_fit

LAUNCH = "launch: {accelerate_config: cpu.yaml}"
SLURM = 'launch: {accelerate_config: ddp.yaml, slurm: {nodes: 2, gpus_per_node: 8, time: "12:00:00", partition: gpu}}'


@pytest.fixture
def plain_chain(tmp_path):
    """A chain that can be read, with no model or data behind it."""
    (tmp_path / "sft.yaml").write_text("model_name_or_path: base\ntrain_file: rows.jsonl\n")
    path = tmp_path / "chain.yaml"
    path.write_text(
        "name: plain\nstages:\n  sft: {recipe: sft, config: sft.yaml}\n"
        f"  dpo: {{recipe: dpo, config: sft.yaml, inputs: {{policy: sft}}}}\n{LAUNCH}\n"
    )
    return path


def launches(path):
    return {stage.name: stage.launch for stage in read_chain(path).stages}


def test_a_stages_launch_keys_replace_the_chains_key_by_key(plain_chain):
    edit(plain_chain, LAUNCH, SLURM.replace("nodes: 2", "environment: {A: 1, B: x}, nodes: 2"))
    edit(
        plain_chain,
        "{policy: sft}}",
        "{policy: sft}, launch: {accelerate_config: zero3.yaml, slurm: {nodes: 8, environment: {B: y}}}}",
    )
    sft, dpo = (launches(plain_chain)[name] for name in ("sft", "dpo"))
    assert (sft.slurm.nodes, sft.slurm.processes, sft.distributed_type) == (2, 16, "MULTI_GPU")
    assert (dpo.slurm.nodes, dpo.slurm.processes, dpo.distributed_type) == (8, 64, "DEEPSPEED")
    assert dpo.slurm.time == sft.slurm.time == "12:00:00"
    assert (sft.slurm.environment, dpo.slurm.environment) == ({"A": "1", "B": "x"}, {"A": "1", "B": "y"})
    assert sft.accelerate_config.name == "ddp.yaml"


def test_the_default_accelerate_config_fits_the_nodes(plain_chain):
    edit(plain_chain, LAUNCH, "launch: {slurm: {nodes: 1}}")
    edit(plain_chain, "{policy: sft}}", "{policy: sft}, launch: {slurm: {gpus_per_node: 1}}}")
    found = launches(plain_chain)
    assert [found[name].accelerate_config.name for name in ("sft", "dpo")] == ["cpu.yaml", "single_gpu.yaml"]


def test_without_slurm_a_stage_still_has_its_own_accelerate_config(plain_chain):
    edit(plain_chain, "{policy: sft}}", "{policy: sft}, launch: {accelerate_config: ddp.yaml}}")
    found = launches(plain_chain)
    assert [found[name].accelerate_config.name for name in ("sft", "dpo")] == ["cpu.yaml", "ddp.yaml"]
    with pytest.raises(ConfigError, match=r"launch.slurm is missing"):
        check_fit(found["sft"], "launch")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("nodes: 2", "node: 2", r"chain.yaml: launch.slurm: unknown key 'node'; did you mean 'nodes'\?"),
        ("slurm:", "slrum:", r"chain.yaml: launch: unknown key 'slrum'; did you mean 'slurm'\?"),
        ("nodes: 2", "nodes: two", r"launch.slurm: nodes must be an integer, got 'two'"),
        ("nodes: 2", "nodes: 0", r"nodes must be at least 1, got 0"),
        ('"12:00:00"', "12:00:00", r'time must be text in quotes, such as "12:00:00".*got 43200'),
        ('"12:00:00"', '"12 hours"', r"time must be minutes, \"hh:mm:ss\" or \"days-hh:mm:ss\", got '12 hours'"),
        ("partition: gpu", "partition: 'gpu; rm -rf ~'", r"partition must be one word"),
        ("partition: gpu", "modules: ['cuda && true']", r"modules must be one word"),
        ("partition: gpu", "extra: [--qos=high, --nodes=3]", r"extra: --nodes is set by posttrain; use nodes"),
        ("partition: gpu", "extra: [-p gpu]", r"extra: -p is set by posttrain; use partition"),
        ("partition: gpu", "extra: [--requeue]", r"extra: --requeue is set by posttrain; the script needs its own"),
        ("partition: gpu", "extra: [qos=high]", r"extra: each item must be one option of sbatch"),
        ("partition: gpu", 'extra: ["--qos=a\\nrm x"]', r"extra: each item must be one option of sbatch"),
        ("partition: gpu", "environment: {WANDB_API_KEY: abc}", r"WANDB_API_KEY looks like a secret"),
        ("partition: gpu", "environment: {2X: abc}", r"'2X' is not a name of a variable"),
        ("partition: gpu", 'container: "apptainer exec \'x"', r"container is not a command"),
        ("{nodes: 2", "{nodes: [2]", r"nodes must be an integer"),
    ],
)
def test_an_invalid_slurm_setting_is_refused_with_its_key(plain_chain, old, new, message):
    edit(plain_chain, LAUNCH, SLURM)
    edit(plain_chain, old, new)
    with pytest.raises(ConfigError, match=message):
        read_chain(plain_chain)


def test_an_invalid_setting_of_a_stage_names_the_stage(plain_chain):
    edit(plain_chain, "{policy: sft}}", "{policy: sft}, launch: {slurm: {gpu_per_node: 2}}}")
    with pytest.raises(ConfigError, match=r"stages.dpo.launch.slurm: unknown key 'gpu_per_node'; did you mean 'gpus"):
        read_chain(plain_chain)
    edit(plain_chain, "slurm: {gpu_per_node: 2}", "accelerate_config: zero9.yaml")
    with pytest.raises(LaunchError, match=r"zero9.yaml does not exist; in accelerate_configs/: cpu.yaml"):
        read_chain(plain_chain)


def test_one_process_on_two_nodes_is_refused(plain_chain):
    edit(plain_chain, LAUNCH, SLURM.replace("ddp.yaml", "cpu.yaml"))
    with pytest.raises(ConfigError, match=re.escape("cpu.yaml has NO")):
        check_fit(launches(plain_chain)["sft"], "launch")


def test_submit_without_slurm_is_a_user_error(plain_chain, tmp_path, monkeypatch):
    edit(plain_chain, LAUNCH, SLURM)
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    edit(tmp_path / "sft.yaml", "rows.jsonl", f"{tmp_path}/rows.jsonl")
    monkeypatch.setenv("PATH", "/nowhere")
    done = subprocess.run(
        [sys.executable, "-m", "posttrain.cli", "submit", str(plain_chain)],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "is not on this machine's PATH: submit from a login node" in done.stderr
