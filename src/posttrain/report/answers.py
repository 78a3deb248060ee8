"""The same prompts, answered by the base model and by every stage that was measured: side by side."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..data.conversation import text_of
from ..errors import ArtifactError
from ..runs.answers import Answer, comparable, read_answers
from ..runs.paths import ANSWERS, EVALUATION

BASE = "base model"


@dataclass(frozen=True)
class Cell:
    """One policy's answer to one prompt."""

    text: str
    right: bool
    stopped: bool
    sampled_right: int
    sampled: int


@dataclass(frozen=True)
class Row:
    prompt: str
    expected: str
    cells: tuple[Cell | None, ...]  # by column; None where that policy was not asked


@dataclass(frozen=True)
class Moved:
    """How many greedy answers a stage mended and broke, against what it started from."""

    stage: str
    mended: int
    broken: int
    kept: int
    wrong: int


@dataclass(frozen=True)
class SideBySide:
    """Rows of answers, of `asked` in all, and how each stage moved them."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    asked: int
    moved: tuple[Moved, ...]


def read_side_by_side(stages: list[tuple[str, Path, bool]], *, most: int = 12) -> SideBySide | None:
    """Answers of (stage, run directory, whether it starts from a base model); None where there are none.

    Rows are chosen so that every pattern of right and wrong among the columns is seen before one is seen twice, the
    commonest first. Raises ArtifactError for a damaged file.
    """
    columns: dict[str, dict[str, Answer]] = {}
    moved: list[Moved] = []
    for name, run_dir, from_base in stages:
        before = _read(run_dir / ANSWERS / "before.jsonl")
        after = _read(run_dir / ANSWERS / "after.jsonl") or _read(run_dir / EVALUATION / "answers.jsonl")
        if before and from_base:
            columns.setdefault(BASE, _by_row(before))
        if after:
            columns[name] = _by_row(after)
        if before and after and comparable(before, after):
            counts = Counter((b.greedy_score, a.greedy_score) for b, a in zip(before, after, strict=True))
            moved.append(Moved(name, counts[0.0, 1.0], counts[1.0, 0.0], counts[1.0, 1.0], counts[0.0, 0.0]))
    if not columns:
        return None
    if BASE in columns:
        columns = {BASE: columns.pop(BASE), **columns}
    asked: dict[str, Answer] = {}
    for answers in columns.values():
        asked |= answers
    chosen = _varied([(key, tuple(_right(by, key) for by in columns.values())) for key in asked], most)
    rows = tuple(
        Row(
            text_of_prompt(asked[key].prompt),
            text_of(asked[key].expected).strip(),
            tuple(_cell(answers.get(key)) for answers in columns.values()),
        )
        for key in chosen
    )
    return SideBySide(tuple(columns), rows, len(asked), tuple(moved))


def text_of_prompt(prompt: str | list[dict[str, str]]) -> str:
    """A prompt as people read it: a single user turn without its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def _by_row(answers: list[Answer]) -> dict[str, Answer]:
    return {json.dumps([a.prompt, a.expected]): a for a in answers}


def _read(path: Path) -> list[Answer]:
    if not path.is_file():
        return []
    try:
        return read_answers(path)
    except (json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); run its stage again") from error


def _right(answers: dict[str, Answer], key: str) -> bool | None:
    return bool(answers[key].greedy_score) if key in answers else None


def _varied(rows: list[tuple[str, tuple[bool | None, ...]]], most: int) -> list[str]:
    """Keys of `most` rows, round and round over the patterns; in each pattern in the file's order."""
    groups: dict[tuple[bool | None, ...], list[str]] = {}
    for key, pattern in rows:
        groups.setdefault(pattern, []).append(key)
    by_size = sorted(groups.values(), key=len, reverse=True)
    chosen: list[str] = []
    for place in range(max(map(len, by_size))):
        chosen += [group[place] for group in by_size if place < len(group)]
        if len(chosen) >= most:
            break
    return chosen[:most]


def _cell(answer: Answer | None) -> Cell | None:
    if answer is None:
        return None
    sampled_right = round(answer.sampled_score * len(answer.sampled)) if answer.sampled else 0
    return Cell(answer.greedy.strip(), bool(answer.greedy_score), answer.stopped, sampled_right, len(answer.sampled))
