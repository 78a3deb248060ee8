"""PPO on two processes under DeepSpeed, against one process without it."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from conftest import ROOT
from posttrain.launch import environment
from posttrain.models.cpu.lm_head import use_dense_lm_head
from zero_runs import RUNS, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one(tiny, adapter, reward_adapter, tmp_path_factory):
    """The folder of the runs in this process."""
    use_dense_lm_head()
    out = tmp_path_factory.mktemp("one")
    for name in RUNS:
        trainer = start(name, tiny, adapter, reward_adapter[0], out, 1)
        trainer.train()
        trainer.save_model(str(out / f"{name}-whole"))
    return out


@pytest.fixture(scope="module")
def two(tiny, adapter, reward_adapter, tmp_path_factory):
    """The folder of the runs in two processes, one folder for each stage of ZeRO."""
    out, file = tmp_path_factory.mktemp("two"), ROOT / "accelerate_configs" / "zero3.yaml"
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, ROOT / "tests" / "zero_runs.py",
        tiny, adapter, reward_adapter[0], out,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, env=environment(file))
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def distance(a: Path, b: Path) -> float:
    x, y = (load_file(folder / "adapter_model.safetensors") for folder in (a, b))
    assert x.keys() == y.keys()
    return max((x[n] - y[n]).abs().max().item() for n in x)


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
@pytest.mark.parametrize("name", ["head", "adapter"])
def test_two_processes_equal_one_and_a_resumed_run_the_uninterrupted_one(one, two, adapter, zero, name):
    assert distance(one / f"{name}-whole", adapter) > 1e-3
    assert distance(two / zero / f"{name}-whole", one / f"{name}-whole") < 1e-5
    assert distance(two / zero / f"{name}-resumed", two / zero / f"{name}-whole") == 0


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_a_rollback_restores_partitioned_parameters(one, two, adapter, zero):
    assert distance(one / "rollback-whole", adapter) == 0
    assert distance(two / zero / "rollback-whole", adapter) == 0
