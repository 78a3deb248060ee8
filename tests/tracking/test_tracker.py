"""The tracker: what a dashboard gets after a resume, and what happens if it fails."""

import json

import pytest

from posttrain.config.sections import TrackingSettings
from posttrain.runs.lineage import Lineage
from posttrain.runs.paths import ALERTS, METRICS
from posttrain.runs.record import read_records
from posttrain.tracking.identity import identify, note, read_run
from posttrain.tracking.run_config import final_numbers
from posttrain.tracking.select import Choice
from posttrain.tracking.tracker import Tracker


class Dashboard:
    """A dashboard that keeps what it gets, has some steps already, and may fail at one."""

    later = ""

    def __init__(self, name="board", last_step=-1, fails_at=None):
        self.name, self.last_step, self.fails_at = name, last_step, fails_at
        self.told = []
        self.config = {}

    def log(self, metrics, step):
        if step == self.fails_at:
            raise ConnectionError("the network is down, token hf_" + "abcd" * 8)
        self.told.append((step, dict(metrics)))

    def log_table(self, name, rows, step):
        self.told.append((step, name, [row["completion"] for row in rows]))

    def alert(self, title, text, step):
        self.told.append((step, "alert", title))

    def update_config(self, config):
        self.config |= config

    def log_lineage(self, lineage):
        self.told.append(("lineage", lineage.stage))

    def finish(self):
        self.told.append("finished")


@pytest.fixture
def track(tmp_path, monkeypatch):
    """A tracker of tmp_path/runs/sft, of the chain `tiny`, that reports to the given dashboards."""
    run = tmp_path / "runs" / "sft"
    run.mkdir(parents=True)
    (run.parent / "chain.json").write_text('{"name": "tiny"}')

    def make(*dashboards, resumed=0):
        boards = {board.name: board for board in dashboards}
        tracker = Tracker(identify(run, "k" * 64, "sft"), Choice(tuple(boards), None, ""), TrackingSettings())
        monkeypatch.setattr(tracker, "_make", lambda name, config: boards[name])
        tracker.start({"seed": 1}, resumed)
        return tracker

    return make


def test_a_new_run_gets_everything_as_it_is_logged(track):
    board = Dashboard()
    tracker = track(board)
    tracker.log({"train/loss": 2.0, "note": "no number"}, 1, max_steps=2)
    tracker.log_completions([{"prompt": "p", "completion": "c", "score": 1.0}], 1)
    tracker.alert("kl runaway", "step 1", 1)
    tracker.finish(Lineage("sft", "sft", "adapter", "k", {}), final={"final/stops": 1.0}, answers=[])
    assert board.told == [
        (1, {"train/loss": 2.0}), (1, "samples/completions", ["c"]), (1, "alert", "kl runaway"),
        (1, {"final/stops": 1.0}), ("lineage", "sft"), "finished",
    ]  # fmt: skip
    assert board.config["measured"]["digest"]


@pytest.mark.parametrize("last_step", [-1, 1, 2, 4])
def test_after_a_resume_each_dashboard_gets_what_it_lacks_and_no_step_twice(track, last_step):
    """Four steps were logged and the checkpoint was at step 3; the dashboard had steps up to `last_step`."""
    before = track()
    for step in (1, 2, 3, 4):
        before.log({"train/loss": 1.0 * step}, step)
        before.log_completions([{"completion": f"a{step}"}, {"completion": f"b{step}"}], step)
    before.alert("dead critic", "since step 2", 2)
    board = Dashboard(last_step=last_step)
    after = track(board, resumed=3)
    for step in (4, 5):
        after.log({"train/loss": 1.0 * step}, step)
    told = [(t[0], t[1]["train/loss"]) for t in board.told if isinstance(t[1], dict)]
    assert told == [(s, 1.0 * s) for s in range(max(last_step, 0) + 1, 6)]
    tables = [(t[0], t[2]) for t in board.told if t[1] == "samples/completions"]
    assert tables == [(s, [f"a{s}", f"b{s}"]) for s in (1, 2, 3) if s > last_step]
    assert [t for t in board.told if t[1] == "alert"] == ([(2, "alert", "dead critic")] if last_step < 2 else [])
    assert [r["step"] for r in read_records(after.identity.run_dir / METRICS)] == [1, 2, 3, 4, 5]
    assert len(list(read_records(after.identity.run_dir / ALERTS))) == 1


def test_a_dashboard_that_fails_is_dropped_with_one_message_and_the_others_continue(track, capsys):
    failing, steady = Dashboard("failing", fails_at=2), Dashboard("steady")
    tracker = track(failing, steady)
    for step in (1, 2, 3):
        tracker.log({"train/loss": 1.0}, step)
    tracker.finish(Lineage("sft", "sft", "adapter", "k", {}), final={}, answers=[])
    assert [t[0] for t in failing.told] == [1]
    assert [t[0] for t in steady.told[:3]] == [1, 2, 3] and steady.told[-1] == "finished"
    said = [line for line in capsys.readouterr().out.splitlines() if "failing" in line]
    assert said == [
        "failing: dropped at step 2, training continues without it "
        "(ConnectionError: the network is down, token [redacted])"
    ]
    assert [r["step"] for r in read_records(tracker.identity.run_dir / METRICS)] == [1, 2, 3]


def test_a_dashboard_that_does_not_start_is_left_out(track, capsys, monkeypatch):
    tracker = track()
    tracker.started = False
    tracker.choice = Choice(("trackio",), None, "")

    def fail(name, config):
        raise OSError("disk quota exceeded")

    monkeypatch.setattr(tracker, "_make", fail)
    tracker.start({}, 0)
    tracker.log({"train/loss": 1.0}, 1)
    assert (
        "trackio: not started, training continues without it (OSError: disk quota exceeded)" in capsys.readouterr().out
    )


def test_a_record_that_cannot_be_written_ends_the_stage(track):
    tracker = track(Dashboard())
    (tracker.identity.run_dir / METRICS).mkdir()
    with pytest.raises(IsADirectoryError):
        tracker.log({"train/loss": 1.0}, 1)


def test_a_run_keeps_its_identity_after_a_resume_but_not_with_another_key(tmp_path):
    first = identify(tmp_path, "a" * 64, "sft")
    note(tmp_path, trackio="t")
    assert identify(tmp_path, "a" * 64, "sft").id == first.id
    assert read_run(tmp_path)["trackio"] == "t"
    other = identify(tmp_path, "b" * 64, "sft")
    assert other.id != first.id
    assert "trackio" not in read_run(tmp_path)  # it belonged to the other run
    assert (first.chain, first.group, first.home) == (None, tmp_path.name, tmp_path.resolve())


def test_two_directories_of_one_key_are_two_runs(tmp_path):
    runs = [identify(folder, "a" * 64, "sft") for folder in (tmp_path / "x", tmp_path / "y") if not folder.mkdir()]
    assert runs[0].id != runs[1].id
    assert json.loads((tmp_path / "x" / "tracking.json").read_text())["id"] == runs[0].id


def test_final_numbers_are_those_measured_after_training():
    metrics = {
        "loss": 0.5, "held_out_accuracy": 0.9, "probe": {"logprobs": [1.0]}, "labels": ["A"], "health": [],
        "after": {"greedy_exact": 0.4, "greedy_exact_low": 0.3, "greedy_exact_high": 0.5}, "measured_on": "test",
    }  # fmt: skip
    assert final_numbers(metrics, {"loss"}) == {"final/held_out_accuracy": 0.9, "final/after/greedy_exact": 0.4}
