"""A real two-node cluster for all of these tests. Without root or packages: a loud skip; in CI, a failure."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, WORDS, make_tiny_model, write_jsonl
from slurm.cluster import Cluster, missing

POSTTRAIN = [sys.executable, "-m", "posttrain.cli"]


@pytest.fixture(scope="session")
def cluster():
    reason = missing()
    if reason is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"no Slurm cluster in CI: {reason}")
        pytest.skip(f"LOUD: nothing of Slurm is tested here: {reason}")
    with pytest.MonkeyPatch.context() as patch, Cluster(Path("/tmp/posttrain-slurm")) as running:
        for name, value in running.env.items():
            patch.setenv(name, value)
        yield running


@pytest.fixture(autouse=True)
def empty_queue(cluster):
    """Each test begins on idle nodes, and leaves nothing behind when it fails."""
    cluster.wait_idle()
    yield
    if left := cluster.queued():
        cluster.slurm("scancel", *left)


def posttrain(command: str, chain: Path, *more: str, expect: int = 0) -> str:
    """`posttrain COMMAND CHAIN` as a user calls it; returns what it printed, both streams."""
    done = subprocess.run(
        [*POSTTRAIN, command, str(chain), *more], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    said = done.stdout + done.stderr
    assert done.returncode == expect, said
    assert "Traceback" not in said
    return said


SETTINGS = """
per_device_train_batch_size: 2
learning_rate: 0.01
gradient_checkpointing: false
logging_steps: 1
save_steps: 1
max_steps: 12
adapter: {r: 4, alpha: 8}
"""


def make_material(folder: Path) -> Path:
    """The tiny model, or the one that POSTTRAIN_SLURM_MODEL names; its rows, and the files of five stages."""
    model = os.environ.get("POSTTRAIN_SLURM_MODEL") or make_tiny_model(folder / "tiny")
    rows = write_jsonl(folder / "rows.jsonl", [{"prompt": f"{w[1:]} ->", "completion": f" {w}"} for w in WORDS])
    pairs = write_jsonl(
        folder / "pairs.jsonl",
        [{"prompt": f"{w[1:]} ->", "chosen": f" {w}", "rejected": f" {w[::-1]}"} for w in WORDS],
    )
    drawn = "max_new_tokens: 4\ngates: {stops: 0}\n"
    (folder / "sft.yaml").write_text(f"model_name_or_path: {model}\ntrain_file: {rows}\n{drawn}{SETTINGS}")
    (folder / "reward.yaml").write_text(f"train_file: {pairs}\n{SETTINGS}")
    (folder / "dpo.yaml").write_text(f"train_file: {pairs}\n{drawn}{SETTINGS}")
    (folder / "ppo.yaml").write_text(
        f"train_file: {rows}\n{drawn}{SETTINGS}max_completion_length: 4\nnum_ppo_epochs: 2\nvalue_mode: adapter\n"
    )
    (folder / "sample.yaml").write_text(
        f"train_file: {rows}\nverifier: 'regex:[a-m].*'\nnum_samples: 8\ntemperature: 2.0\nmax_new_tokens: 4\n"
        "generation_batch_size: 16\n"
    )
    return folder


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def write_chain(material, tmp_path):
    """Write a chain of some of the stages into a folder of its own."""

    def write(stages: dict[str, str], *, launch: str = "", name: str = "tiny", output_dir: Path | None = None) -> Path:
        for file in material.glob("*.yaml"):
            shutil.copy(file, tmp_path)
        lines = "".join(
            f"  {stage}: {{recipe: {stage}, config: {stage}.yaml{more}}}\n" for stage, more in stages.items()
        )
        path = tmp_path / "chain.yaml"
        path.write_text(
            f"name: {name}\noutput_dir: {output_dir or tmp_path / 'runs'}\nstages:\n{lines}"
            f"launch: {{accelerate_config: ddp.yaml, slurm: {{nodes: 2, cpus_per_task: 2{launch}}}}}\n"
        )
        return path

    return write
