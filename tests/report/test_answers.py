"""The same prompts side by side: the right rows, and what each stage fixed."""

from pathlib import Path

import pytest

from posttrain.errors import ArtifactError
from posttrain.report.answers import read_side_by_side
from posttrain.runs.answers import Answer, write_answers


def given(run: Path, when: str, greedy: list[str], prompts=None) -> None:
    (run / "answers").mkdir(parents=True, exist_ok=True)
    prompts = prompts or [f"p{n}" for n in range(len(greedy))]
    write_answers(
        run / "answers" / f"{when}.jsonl",
        [Answer(p, "yes", g, True, ["yes", "no"]) for p, g in zip(prompts, greedy, strict=True)],
    )


def test_each_pattern_of_right_and_wrong_is_shown_before_any_repeats(tmp_path):
    base = ["no"] * 20
    sft = ["yes"] * 15 + ["no"] * 5
    dpo = ["yes"] * 14 + ["no"] + ["no"] * 4 + ["yes"]
    given(tmp_path / "sft", "before", base)
    given(tmp_path / "sft", "after", sft)
    given(tmp_path / "dpo", "before", sft)
    given(tmp_path / "dpo", "after", dpo)
    found = read_side_by_side([("sft", tmp_path / "sft", True), ("dpo", tmp_path / "dpo", False)], most=6)
    assert found.columns == ("base model", "sft", "dpo")
    assert found.asked == 20
    patterns = [tuple(c.right for c in row.cells) for row in found.rows]
    assert patterns[:4] == [(False, True, True), (False, False, False), (False, True, False), (False, False, True)]
    assert [r.prompt for r in found.rows[:4]] == ["p0", "p15", "p14", "p19"]
    assert [(m.stage, m.fixed, m.broken, m.kept, m.wrong) for m in found.moved] == [
        ("sft", 15, 0, 0, 5), ("dpo", 1, 1, 14, 4),
    ]  # fmt: skip
    assert (found.rows[0].cells[0].sampled_right, found.rows[0].cells[0].sampled) == (1, 2)


def test_a_stage_without_a_row_has_an_empty_cell(tmp_path):
    given(tmp_path / "a", "after", ["yes"], ["one"])
    given(tmp_path / "b", "after", ["no"], ["two"])
    found = read_side_by_side([("a", tmp_path / "a", False), ("b", tmp_path / "b", False)])
    cells = {row.prompt: [c and c.text for c in row.cells] for row in found.rows}
    assert cells == {"one": ["yes", None], "two": [None, "no"]}


def test_missing_answers_give_none_and_damaged_ones_an_error(tmp_path):
    assert read_side_by_side([("sft", tmp_path, True)]) is None
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "after.jsonl").write_text('{"prompt": 1}\n')
    with pytest.raises(ArtifactError, match=r"after.jsonl is damaged"):
        read_side_by_side([("sft", tmp_path, True)])
