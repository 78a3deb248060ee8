"""A running chain in a terminal: the live view, and plain lines as its alternative."""

import io
import json

import pytest
from rich.console import Console

from posttrain.chain.view import Lines
from posttrain.report.curves import Curve
from posttrain.report.terminal import LiveView, Tail, choose_view, sparkline


def curve(*values):
    made = Curve()
    for step, value in enumerate(values):
        made.add(step, value)
    return made


def test_a_sparkline_rises_and_falls_with_its_curve():
    assert sparkline(curve(0, 1, 2, 3, 4, 5, 6, 7)) == "▁▂▃▄▅▆▇█"
    assert sparkline(curve(2, 0)) == "█▁"
    assert sparkline(curve(3, 3, 3)) == "▁▁▁"
    assert sparkline(Curve()) == ""
    assert sparkline(curve(*range(1000)), width=8) == "▁▂▃▄▅▆▇█"


def test_a_tail_gives_complete_lines_once_and_restarts_with_a_new_file(tmp_path):
    path = tmp_path / "f"
    tail = Tail(path)
    assert tail.read() == (False, [])
    path.write_text("a\nb")
    assert tail.read() == (False, ["a"])
    path.write_text("a\nbc\nd\n")
    assert tail.read() == (False, ["bc", "d"])
    assert tail.read() == (False, [])
    path.write_text("x\n")
    assert tail.read() == (True, ["x"])


def shown(view):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(view.render())
    return console.export_text()


def test_the_live_view_shows_stages_metrics_and_findings(tmp_path):
    (tmp_path / "ppo").mkdir()
    view = LiveView("chain [bold]x[/bold]", Console(file=io.StringIO(), force_terminal=True))
    view.planned("sft", "skip", "complete", tmp_path / "sft", "exact match 41.6%")
    view.planned("ppo", "resume", "was cut off", tmp_path / "ppo", "")
    view.planned("dpo", "run", "not there yet", tmp_path / "dpo", "")
    assert "1 of 3 stages complete" in shown(view)
    stderr = tmp_path / "ppo.stderr"
    stderr.write_text("x.py: UserWarning: step 1: dead critic (0, limit 0). From a try before.\n")
    view.started("ppo", "[2/3 ppo]", "accelerate launch", stderr)
    view.line("ppo", "[2/3 ppo]", "step 3/56  prompts drawn\n")
    page = shown(view)
    assert "3/56" in page
    assert "chain [bold]x[/bold]" in page
    records = [
        {"step": s, "max_steps": 56, "left_s": 90.0, "objective/scores": s, "train/loss": 1.0, "lr": 1}
        for s in range(4, 20)
    ]
    (tmp_path / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    with stderr.open("a") as file:
        file.write("x.py: UserWarning: step 8: kl runaway (9, limit 4). Raise kl_coef.\n")
    page = shown(view)
    for words in (
        "19/56",
        "1:30 left",
        "objective/scores",
        "▁▁▂▂▃▃▄▄▅▅▆▆▇▇██",
        "loss",
        "! ppo, step 8: kl runaway: 9, limit 4",
    ):
        assert words in page, page
    assert "dead critic" not in page
    with (tmp_path / "ppo" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "loss": NaN}\n')
    assert "! ppo, step 20: loss is not finite" in shown(view)
    view.ended("ppo", "reward 1.2")
    view.started("dpo", "", "", stderr)
    view.ended("dpo", None)
    page = shown(view)
    assert "✓ ppo" in page
    assert "reward 1.2" in page
    assert "✗ dpo" in page
    assert all(len(line) <= 100 for line in page.splitlines())


def test_plain_lines(capsys, tmp_path):
    with Lines() as view:
        view.planned("sft", "run", "not there yet", tmp_path, "")
        view.started("sft", "[1/1 sft]", "accelerate launch x", tmp_path)
        view.line("sft", "[1/1 sft]", "effective configuration: {}\n")
        view.line("sft", "[1/1 sft]", "step 1/2\n")
        view.ended("sft", "done")
    assert capsys.readouterr().out.splitlines() == [
        "   run  sft          not there yet", "[1/1 sft] accelerate launch x", "[1/1 sft] step 1/2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tty", "term", "plain"), [(False, "xterm", False), (True, "dumb", False), (True, "xterm", True)]
)
def test_plain_lines_are_used_without_a_capable_terminal(monkeypatch, tty, term, plain):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr("sys.stdout.isatty", lambda: tty, raising=False)
    assert type(choose_view("c", plain=plain)) is Lines
