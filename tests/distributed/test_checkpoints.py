"""Which checkpoint a run resumes from."""

import pytest

from posttrain.distributed.checkpoints import last_whole_checkpoint
from posttrain.errors import LaunchError


def checkpoint(folder, step, *, state=True, written=True, weights=b""):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if state:
        (path / "trainer_state.json").write_text("{}")
    if written:
        (path / "written_by.json").write_text("{}")
    if weights is not None:
        (path / "adapter_model.safetensors").write_bytes(weights)
    return path


WHOLE = (2).to_bytes(8, "little") + b"{}"


def test_the_newest_complete_checkpoint_is_found_and_broken_ones_are_deleted(tmp_path):
    checkpoint(tmp_path, 5, weights=WHOLE)
    good = checkpoint(tmp_path, 10, weights=WHOLE)
    checkpoint(tmp_path, 15, weights=WHOLE[:-1])
    checkpoint(tmp_path, 100, state=False, weights=WHOLE)
    checkpoint(tmp_path, 105, written=False, weights=WHOLE)  # another process was still at its share
    assert last_whole_checkpoint(tmp_path) == good
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-5"]


def test_without_checkpoints_there_is_none_to_resume_from(tmp_path):
    assert last_whole_checkpoint(tmp_path / "none") is None


def test_a_users_own_copy_of_a_checkpoint_is_left_alone(tmp_path):
    good = checkpoint(tmp_path, 10, weights=WHOLE)
    (tmp_path / "checkpoint-100.bak").mkdir()
    assert last_whole_checkpoint(tmp_path) == good
    assert (tmp_path / "checkpoint-100.bak").is_dir()


def test_a_checkpoint_that_cannot_be_read_is_not_deleted(tmp_path):
    broken = checkpoint(tmp_path, 10, weights=WHOLE, state=False)
    (broken / "trainer_state.json").mkdir()  # reading it is an OSError, and not that it is missing
    with pytest.raises(LaunchError, match="checkpoint-10 cannot be read"):
        last_whole_checkpoint(tmp_path)
    assert broken.is_dir()
