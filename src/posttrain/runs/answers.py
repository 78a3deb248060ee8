"""A policy's answers to the test rows: written, read, compared row by row. Imports no torch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data.conversation import is_exact
from ..fileio import lines_of, write_atomically
from ..intervals import mean_interval, wilson, write_share


@dataclass(frozen=True)
class Answer:
    """A policy's answers to one test row: the greedy one, and the sampled ones."""

    prompt: Any
    expected: Any
    greedy: str
    stopped: bool  # the greedy completion ended by EOS
    sampled: list[str]

    @property
    def greedy_score(self) -> float:
        return float(is_exact(self.greedy, self.expected))

    @property
    def sampled_score(self) -> float:
        return sum(is_exact(text, self.expected) for text in self.sampled) / len(self.sampled)


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Write one JSON object per row."""
    write_atomically(path, "".join(json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in answers))


def read_answers(path: Path) -> list[Answer]:
    return [Answer(**json.loads(line)) for line in lines_of(path.read_text(encoding="utf-8"))]


def exact_match(answers: Sequence[Answer]) -> dict[str, float]:
    """Greedy and sampled exact match, and the share of greedy completions that end by EOS."""
    metrics: dict[str, float] = {"rows": len(answers)}
    metrics |= write_share("greedy_exact", wilson(sum(a.greedy_score for a in answers), len(answers)))
    metrics["stops"] = sum(a.stopped for a in answers) / len(answers)
    if answers[0].sampled:
        metrics |= write_share("sampled_exact", mean_interval([a.sampled_score for a in answers]))
    return metrics


def comparable(before: Sequence[Answer], after: Sequence[Answer]) -> bool:
    """Whether both answered the same rows, with the same number of samples."""
    return [(a.prompt, a.expected, len(a.sampled)) for a in before] == [
        (a.prompt, a.expected, len(a.sampled)) for a in after
    ]


def change(before: Sequence[Answer], after: Sequence[Answer]) -> dict[str, float]:
    """Change of exact match, paired by row: the difficulty of a row is in both and cancels."""
    pairs = list(zip(before, after, strict=True))
    metrics = write_share(
        "greedy_exact", mean_interval([b.greedy_score - a.greedy_score for a, b in pairs], lowest=-1.0)
    )
    if after[0].sampled:
        metrics |= write_share(
            "sampled_exact", mean_interval([b.sampled_score - a.sampled_score for a, b in pairs], lowest=-1.0)
        )
    return metrics
