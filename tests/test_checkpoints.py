"""A checkpoint of several processes is whole when the last of them has written its part."""

import pytest

from posttrain.checkpoints import is_whole, last_whole_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    return folder


def test_one_process_leaves_no_marks(checkpoint):
    (checkpoint / "rng_state.pth").touch()
    assert is_whole(checkpoint)


@pytest.mark.parametrize("written", [(), (0,), (1,), (0, 2)])
def test_a_process_that_was_killed_before_its_part_is_noticed(checkpoint, written):
    for rank in written:
        (checkpoint / f"rng_state_{rank}.pth").touch()
        (checkpoint / f"rank-{rank}-of-3").touch()
    (checkpoint / "rng_state_0.pth").touch()
    assert not is_whole(checkpoint)
    assert last_whole_checkpoint(checkpoint.parent) is None
    assert not checkpoint.exists()


def test_all_have_written(checkpoint):
    for rank in range(3):
        (checkpoint / f"rng_state_{rank}.pth").touch()
        (checkpoint / f"rank-{rank}-of-3").touch()
    assert last_whole_checkpoint(checkpoint.parent) == checkpoint
