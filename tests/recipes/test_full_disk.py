"""A disk that is too small (a small tmpfs): refused before training, or filled by a save and resumed later."""

import os

import pytest

from conftest import run_recipe, small_disk

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="LOUD: mounting a small tmpfs needs root; not tested here")

TRAIN = [
    "--per_device_train_batch_size", "4", "--learning_rate", "0.01", "--gradient_checkpointing", "false",
    "--max_steps", "6", "--save_steps", "1", "--adapter.r", "4", "--adapter.alpha", "8",
    "--gates.stops", "0", "--max_new_tokens", "4",
]  # fmt: skip


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as resize:
        yield resize


def test_a_disk_that_is_too_small_is_refused_before_training(tiny, pairs, disk):
    out = disk("64k") / "sft"
    done = run_recipe("sft", "--model_name_or_path", tiny, "--train_file", pairs, "--output_dir", out, *TRAIN, expect=2)
    assert "GiB free, about" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (out / "metrics.jsonl").exists()


def test_a_disk_that_fills_in_a_save_loses_nothing(tiny, pairs, disk):
    out = disk("320k") / "sft"
    command = ["--model_name_or_path", tiny, "--train_file", pairs, "--output_dir", out, *TRAIN]
    done = run_recipe("sft", *command, expect=2)
    assert "no space left on the device" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (out / "lineage.json").exists()
    assert not (out / "adapter").exists()
    disk("20m")
    done = run_recipe("sft", *command)
    assert "resuming from" in done.stdout
    assert (out / "lineage.json").is_file()
