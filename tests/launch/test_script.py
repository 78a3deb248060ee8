"""A batch script: its options for Slurm, its commands, and quoting."""

import itertools
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import ROOT
from posttrain.launch.script import Job, options, render
from posttrain.launch.settings import LaunchSettings, SlurmSettings

CONFIGS = ROOT / "accelerate_configs"


def job(config="ddp.yaml", *, folder=Path("/scratch/runs"), **slurm):
    return Job(
        chain="c", stage="sft", key="a" * 64, recipe="sft", arguments=["--config", "it's.yaml", "--beta", "0.1"],
        launch=LaunchSettings(CONFIGS / config, SlurmSettings(**slurm)), run_dir=folder / "sft",
        state=folder / ".slurm" / "sft", script=folder / ".slurm" / "sft.sbatch", cwd=Path("/home/ada"),
    )  # fmt: skip


def accelerate_command(script):
    """The words of the command that a node runs."""
    text = re.search(r'exec "\$python" -m (accelerate.*?) rank\n', script, re.DOTALL)[1]
    return shlex.split(text.replace("\\\n", " "))


@pytest.mark.parametrize("config", ["ddp.yaml", "zero3.yaml"])
def test_ranks_come_from_inside_the_step(config):
    words = accelerate_command(render(job(config, nodes=4, gpus_per_node=8)))
    values = dict(itertools.pairwise(words))
    assert values["--machine_rank"] == "$SLURM_NODEID"
    assert (values["--num_machines"], values["--num_processes"]) == ("4", "32")
    assert values["--rdzv_backend"] == "static"
    assert "--same_network" in words
    assert values["--config_file"] == str(CONFIGS / config)
    # DeepSpeed's own multi-node launcher is pdsh, which needs ssh to every node.
    assert values.get("--deepspeed_multinode_launcher") == ("standard" if config == "zero3.yaml" else None)


def test_fsdp2_is_launched_with_its_own_configuration(tmp_path):
    (tmp_path / "fsdp2.yaml").write_text("distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\n")
    launch = LaunchSettings(tmp_path / "fsdp2.yaml", SlurmSettings(nodes=2, gpus_per_node=4))
    words = accelerate_command(render(replace(job(), launch=launch)))
    assert words[words.index("--config_file") + 1] == str(tmp_path / "fsdp2.yaml")
    assert words[words.index("--num_processes") + 1] == "8"
    assert "--deepspeed_multinode_launcher" not in words


def test_resources_are_in_the_sbatch_lines():
    found = options(
        job(nodes=2, gpus_per_node=8, cpus_per_task=96, time="2-00", partition="gpu", account="lab",
            constraint="a100|h100", extra=["--qos=high", "--exclusive"], signal_s=600)
    )  # fmt: skip
    assert set(found) >= {
        "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--cpus-per-task=96", "--time=2-00", "--partition=gpu",
        "--account=lab", '--constraint="a100|h100"', "--qos=high", "--exclusive", "--signal=B:USR1@600", "--requeue",
        "--open-mode=append", "--chdir=/home/ada",
    }  # fmt: skip
    assert not [line for line in options(job()) if "gpus" in line or "time" in line]


@pytest.mark.parametrize(
    "slurm",
    [
        {},
        {"nodes": 2, "modules": ["cuda/12.4"], "environment": {"GREETING": "it's $HOME"}},
        {"nodes": 2, "gpus_per_node": 2, "cpus_per_task": 8, "container": "apptainer exec --nv 'my image.sif'"},
    ],
)
def test_bash_parses_the_script_for_any_path(tmp_path, slurm):
    folder = tmp_path / "a folder's name"
    folder.mkdir()
    script = tmp_path / "x.sbatch"
    script.write_text(render(job(folder=folder, **slurm)))
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "{{" not in text and "{%" not in text
    # sbatch stops reading options at the first line that is not a comment.
    head = text.split("\nscript=")[0].splitlines()
    assert [line for line in head if not line.startswith("#")] == []
    if "environment" in slurm:
        line = re.search(r"export GREETING=.*", text)[0]
        assert subprocess.run(
            ["bash", "-c", f'{line}; printf %s "$GREETING"'], capture_output=True, text=True
        ).stdout == ("it's $HOME")
    if "container" in slurm:
        assert "apptainer exec --nv 'my image.sif' bash \"$script\" node" in text


def test_a_rank_runs_the_recipe_with_its_arguments_into_a_log_of_its_own(tmp_path):
    """Runs the last of the three levels: quoted arguments arrive unchanged."""
    state = tmp_path / ".slurm" / "sft"
    state.mkdir(parents=True)
    script = tmp_path / "x.sbatch"
    text = render(job(folder=tmp_path))
    script.write_text(re.sub(r"^python=.*", "python=echo", text, flags=re.MULTILINE))
    for restart in ("0", "1"):
        env = {
            "RANK": "3",
            "WORLD_SIZE": "8",
            "SLURMD_NODENAME": "n2",
            "POSTTRAIN_RESTARTS": restart,
            "PATH": "/usr/bin:/bin",
        }
        subprocess.run(["bash", str(script), "rank"], check=True, env=env)
    first, said, second, again = (state / "rank-3.log").read_text().splitlines()
    assert first.startswith("== rank 3 of 8 on node n2, restart 0, ")
    assert second.startswith("== rank 3 of 8 on node n2, restart 1, ")
    assert said == again == f"{ROOT}/recipes/sft.py --config it's.yaml --beta 0.1"


def test_ports_differ_between_jobs_and_restarts():
    expression = re.search(r"port=\$\(\((.*)\)\)", render(job()))[1]
    ports = {
        eval(expression.replace("SLURM_JOB_ID", str(job_id)).replace("restarts", str(restart)))
        for job_id in range(1000, 1030) for restart in range(6)
    }  # fmt: skip
    assert len(ports | {port + 1 for port in ports}) == 2 * 30 * 6  # the roll call has the port after
    assert all(20000 <= port < 32000 for port in ports)  # below those that Linux gives out by itself
