"""A run directory has one owner, and one process at a time."""

import pytest

from posttrain.errors import ArtifactError, LaunchError
from posttrain.runs.directory import lock, take_directory


def test_a_directory_is_refused_to_another_run_once_it_has_work(tmp_path):
    run = tmp_path / "run"
    take_directory(run, "a" * 64, "sft")
    take_directory(run, "a" * 64, "sft")  # a resume
    take_directory(run, "b" * 64, "sft")  # nothing was computed yet: another configuration may have it
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ArtifactError, match="unfinished run with another configuration"):
        take_directory(run, "c" * 64, "sft")


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ArtifactError, match="was not made by posttrain"):
        take_directory(tmp_path, "a", "sft")


def test_two_processes_cannot_hold_one_directory(tmp_path):
    held = lock(tmp_path)
    with pytest.raises(LaunchError, match="another process is training"):
        lock(tmp_path)
    held.close()
    lock(tmp_path).close()


def test_a_locked_directory_keeps_its_owner(tmp_path):
    """Its owner is kept even if nothing was computed yet: the process would otherwise resume as another run."""
    held = take_directory(tmp_path / "run", "a" * 64, "sft")
    with pytest.raises(LaunchError, match="another process is training"):
        take_directory(tmp_path / "run", "b" * 64, "sft")
    assert '"aaaa' in (tmp_path / "run" / "stage.json").read_text()
    held.close()


def test_a_directory_with_only_a_lock_counts_as_empty(tmp_path):
    lock(tmp_path).close()
    take_directory(tmp_path, "a" * 64, "sft").close()
