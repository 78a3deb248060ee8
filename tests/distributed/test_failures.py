"""Failures between processes: each one reports them within a minute, and the last checkpoint stays complete."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from conftest import PYTHON, ROOT, WORDS, make_tiny_model, run_here, write_jsonl
from distributed.cells import arguments
from distributed.test_strategies import distance
from posttrain.distributed.checkpoints import last_whole_checkpoint
from posttrain.launch import environment

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("forked_processes")]

LAUNCH = ["-m", "accelerate.commands.launch", "--config_file"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    make_tiny_model(folder / "tiny")
    write_jsonl(folder / "train.jsonl", [{"prompt": f"{w[1:]} ->", "completion": f" {w}"} for w in WORDS])
    return folder


@pytest.fixture(scope="module")
def one(files, tmp_path_factory):
    """The run of one process."""
    out = tmp_path_factory.mktemp("one")
    run_here("sft", *arguments("sft", "lora", files, out / "run", 1))
    return out / "run"


def config_file(name: str) -> Path:
    return ROOT / "accelerate_configs" / f"{name}.yaml"


def launch(config: Path, *words, flags=()) -> subprocess.CompletedProcess:
    command = [sys.executable, *LAUNCH, config, *flags, *words]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=580, env=environment(config)
    )  # fmt: skip


def errors(done) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith(("LaunchError", "ConfigError"))]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_a_killed_rank_ends_the_launch_and_the_run_resumes(files, one, tmp_path, config):
    """The other rank reports it and the launch ends; the same command resumes, and the result equals one process's."""
    words = arguments("sft", "lora", files, tmp_path / "run", 2)
    done = launch(config_file(config), Path(__file__).with_name("rank_that.py"), "dies", "sft", *words)
    assert done.returncode != 0
    assert time.time() - (tmp_path / "died").stat().st_mtime < 60
    assert any("rank 0 of 2" in line for line in errors(done)), done.stderr[-3000:]
    assert last_whole_checkpoint(tmp_path / "run" / "checkpoints").name == "checkpoint-2"

    done = launch(config_file(config), ROOT / "recipes" / "sft.py", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming from" in done.stdout and "step 1/3" not in done.stdout
    assert distance(tmp_path / "run", one, "lora") < 1e-5


@pytest.mark.parametrize("recipe", ["sft", "sample"])
@pytest.mark.parametrize("what", ["seed", "data"])
def test_ranks_with_another_seed_or_other_rows_are_refused(files, tmp_path, recipe, what):
    """Each rank names the difference before weights are read."""
    words = [
        "--model_name_or_path",
        files / "tiny",
        "--train_file",
        files / "train.jsonl",
        "--output_dir",
        tmp_path / "run",
    ]
    words += ["--verifier", "regex:.*"] if recipe == "sample" else ["--gates.stops", 0]
    begun = time.monotonic()
    done = launch(config_file("ddp"), Path(__file__).with_name("rank_that.py"), what, recipe, *words)
    assert done.returncode != 0 and time.monotonic() - begun < 60
    assert len([e for e in errors(done) if "about to do different things" in e]) == 2, done.stderr[-3000:]
    assert {"seed": "seed: 42 on rank 0", "data": "data: {"}[what] in done.stderr
    assert "Loading weights" not in done.stderr


def test_rendezvous_names_differences_and_missing_ranks(tmp_path):
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(Path(__file__).with_name("meeting.py"))]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**env, "RANK": rank}) for rank in ("0", "1")
    ]
    out = [process.communicate(timeout=200)[0] for process in both]
    for rank in (0, 1):
        assert f"rank {rank}: met [0, 1]" in out[rank]
        assert "seed: 0 on rank 0" in out[rank] and "1 on rank 1" in out[rank]
    assert "rank 1 did not come within 2 s of rank 0" in out[0]
    assert int(out[0].rpartition("after ")[2].split()[0]) <= 4


def test_a_second_machine_without_a_first_one_gives_up(files, tmp_path):
    """multinode.yaml on the second machine only: it ends after the given time, with the address that it tried."""
    words = arguments("sft", "lora", files, tmp_path / "run", 2)
    flags = ["--machine_rank", 1, "--num_processes", 2, "--main_process_port", free_port(), "--rdzv_conf", "timeout=3"]
    begun = time.monotonic()
    done = launch(config_file("multinode"), ROOT / "recipes" / "sft.py", *words, flags=flags)
    assert done.returncode != 0 and time.monotonic() - begun < 60
    assert "DistNetworkError" in done.stderr and "timed out" in done.stderr


def test_two_launchers_train_one_run(files, one, tmp_path):
    """multinode.yaml unchanged, one launcher for each of two machines, here both on this one."""
    words = list(map(str, arguments("sft", "lora", files, tmp_path / "run", 2)))
    flags = ["--num_processes", "2", "--main_process_port", str(free_port()), "--rdzv_conf", "timeout=60"]
    file = config_file("multinode")
    two = [
        subprocess.Popen(
            [PYTHON, *LAUNCH, str(file), "--machine_rank", rank, *flags, str(ROOT / "recipes" / "sft.py"), *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(file),
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    out = [process.communicate(timeout=580) for process in two]
    assert [process.returncode for process in two] == [0, 0], out
    assert "ddp on 2 processes" in out[0][0] and "complete" in out[0][0] and "complete" not in out[1][0]
    assert distance(tmp_path / "run", one, "lora") < 1e-5


def test_a_single_process_for_multi_cpu_is_refused(files, tmp_path):
    """accelerate starts one process for MULTI_CPU, whatever its num_processes, and would end with success."""
    config = yaml.safe_load(config_file("ddp").read_text()) | {"distributed_type": "MULTI_CPU", "use_cpu": True}
    file = tmp_path / "cpu2.yaml"
    file.write_text(yaml.safe_dump(config))
    done = launch(file, ROOT / "recipes" / "sft.py", *arguments("sft", "lora", files, tmp_path / "run", 2))
    assert done.returncode != 0 and "asks for several processes, and accelerate started one" in done.stderr
    assert not (tmp_path / "run").exists()
