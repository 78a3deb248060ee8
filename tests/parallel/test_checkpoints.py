"""Which checkpoint a run goes on from."""

from posttrain.parallel.checkpoints import last_whole_checkpoint


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
