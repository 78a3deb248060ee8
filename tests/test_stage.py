"""What a stage keeps, refuses and counts."""

import pytest

from posttrain.errors import ArtifactError, LaunchError
from posttrain.stage import count_tokens, last_whole_checkpoint, lock, pair_lengths, take_directory


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


def test_the_newest_whole_checkpoint_is_found_and_broken_ones_go(tmp_path):
    checkpoint(tmp_path, 5, weights=WHOLE)
    good = checkpoint(tmp_path, 10, weights=WHOLE)
    checkpoint(tmp_path, 15, weights=WHOLE[:-1])
    checkpoint(tmp_path, 100, state=False, weights=WHOLE)
    checkpoint(tmp_path, 105, written=False, weights=WHOLE)  # another process was still at its share
    assert last_whole_checkpoint(tmp_path) == good
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-5"]


def test_no_checkpoint(tmp_path):
    assert last_whole_checkpoint(tmp_path / "none") is None


def test_a_directory_is_taken_once(tmp_path):
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


def test_tokens_are_those_of_the_sequences():
    from datasets import Dataset

    assert count_tokens(Dataset.from_dict({"input_ids": [[1, 2], [3]]})) == 3
    preference = {"prompt_ids": [[1, 2, 3]], "chosen_ids": [[4]], "rejected_ids": [[5, 6]]}
    assert count_tokens(Dataset.from_dict(preference)) == (3 + 1) + (3 + 2)


def test_a_pair_is_as_long_as_its_longer_side():
    from datasets import Dataset

    sides = {"chosen_ids": [[4], [4, 5]], "rejected_ids": [[5, 6, 7], [5]]}
    assert pair_lengths(Dataset.from_dict({"prompt_ids": [[1, 2], [1]], **sides})) == [5, 3]
    assert pair_lengths(Dataset.from_dict(sides)) == [3, 2]
