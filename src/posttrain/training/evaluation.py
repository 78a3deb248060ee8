"""Exact match of a policy on held-out rows: greedy, and as the mean over samples at temperature 1.

Intervals are 95%: Wilson for the greedy share, a normal interval over the rows' means for the sampled one, and for a
change the same over the rows' differences. Draws are seeded by batch, so that the same policy and seed give the same
numbers, and two policies are drawn from with the same random numbers.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..fileio import lines_of, write_atomically
from ..intervals import _flatten, mean_interval, wilson
from ..models.generation import generate
from ..models.verifiers import is_exact


@dataclass(frozen=True)
class Answer:
    """What a policy answered to one test row: greedily, and in each sample."""

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


def answer(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], *, max_new_tokens: int, batch_size: int,
    num_samples: int, seed: int, progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:  # fmt: skip
    """A greedy completion and `num_samples` at temperature 1 for each of the prompt-completion `rows`."""
    completions = generate(
        model, tokenizer, [row["prompt"] for row in rows], temperatures=[0.0] + [1.0] * num_samples,
        max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed, progress=progress,
    )  # fmt: skip
    return [
        Answer(row["prompt"], row["completion"], cs[0].text, cs[0].stopped, [c.text for c in cs[1:]])
        for row, cs in zip(rows, completions, strict=True)
    ]


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    """One JSON object a row."""
    write_atomically(path, "".join(json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in answers))


def read_answers(path: Path) -> list[Answer]:
    return [Answer(**json.loads(line)) for line in lines_of(path.read_text(encoding="utf-8"))]


def exact_match(answers: Sequence[Answer]) -> dict[str, float]:
    """Greedy and sampled exact match, with the share of greedy completions that stop."""
    metrics: dict[str, float] = {"rows": len(answers)}
    metrics |= _flatten("greedy_exact", wilson(sum(a.greedy_score for a in answers), len(answers)))
    metrics["stops"] = sum(a.stopped for a in answers) / len(answers)
    if answers[0].sampled:
        metrics |= _flatten("sampled_exact", mean_interval([a.sampled_score for a in answers]))
    return metrics


def comparable(before: Sequence[Answer], after: Sequence[Answer]) -> bool:
    """Whether both answered the same rows, with the same number of samples."""
    return [(a.prompt, a.expected, len(a.sampled)) for a in before] == [
        (a.prompt, a.expected, len(a.sampled)) for a in after
    ]


def change(before: Sequence[Answer], after: Sequence[Answer]) -> dict[str, float]:
    """By how much exact match rose, row by row: a row's own difficulty is in both and cancels."""
    pairs = list(zip(before, after, strict=True))
    metrics = _flatten("greedy_exact", mean_interval([b.greedy_score - a.greedy_score for a, b in pairs], lowest=-1.0))
    if after[0].sampled:
        metrics |= _flatten(
            "sampled_exact", mean_interval([b.sampled_score - a.sampled_score for a, b in pairs], lowest=-1.0)
        )
    return metrics
