"""A tagger's answers: confusions of types, and intervals of F1."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ArtifactError
from ..fileio import lines_of
from ..ner.tags import spans, to_bio
from ..runs.paths import ANSWERS

NONE, OTHER_ENDS = "none", "wrong boundaries"
RESAMPLES, SEED = 1000, 0


@dataclass(frozen=True)
class TypeScore:
    """The scores of one entity type, or of all ("micro"), with the 95% interval of F1."""

    label: str
    precision: float
    recall: float
    f1: float
    f1_low: float
    f1_high: float
    support: int


@dataclass(frozen=True)
class Mistake:
    kind: str
    count: int
    example: str
    origin: str


@dataclass(frozen=True)
class Entities:
    """The results on one set of sentences. `confusions`: gold types (rows, "none" last) by predicted types."""

    measured_on: str
    sentences: int
    scores: tuple[TypeScore, ...]
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    confusions: tuple[tuple[int, ...], ...]
    mistakes: tuple[Mistake, ...]


def read_entities(run_dir: Path, measured_on: str) -> Entities | None:
    """The tagger's answers of a run; None if it has none. Raises ArtifactError for damaged files."""
    summary_file, answers_file = (run_dir / ANSWERS / f"{measured_on}{suffix}" for suffix in (".json", ".jsonl"))
    if not (summary_file.is_file() and answers_file.is_file()):
        return None
    try:
        summary = json.loads(summary_file.read_text(encoding="utf-8"))
        answers = [json.loads(line) for line in lines_of(answers_file.read_text(encoding="utf-8"))]
        scores, gold, found = summary["scores"], [a["tags"] for a in answers], [a["found"] for a in answers]
        mistakes = tuple(Mistake(**m) for m in summary["mistakes"])
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{answers_file} or its .json is damaged ({error}); run its stage again") from error
    labels = tuple(sorted(label for label in scores if label != "micro"))
    intervals = f1_intervals(gold, found, labels)
    typed = tuple(
        TypeScore(
            label, scores[label]["precision"], scores[label]["recall"], scores[label]["f1"], *intervals[label],
            scores[label]["support"],
        )
        for label in (*labels, "micro")
    )  # fmt: skip
    columns, counts = confusions(gold, found, labels)
    return Entities(measured_on, len(answers), typed, labels, columns, counts, mistakes)


def confusions(
    gold: Sequence[Sequence[str]], found: Sequence[Sequence[str]], labels: Sequence[str]
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """(columns, counts): each gold entity by the prediction in its place; the last row has spurious predictions.

    Columns are the types, then "wrong boundaries" (of the right type), then "none". If several predictions overlap an
    entity, the first counts, as in the list of mistakes.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for gold_tags, found_tags in zip(gold, found, strict=True):
        true, guesses = set(spans(gold_tags)), set(spans(to_bio(found_tags, "bio", repair=True)))
        wrong = sorted(guesses - true)
        for start, end, label in true:
            if (start, end, label) in guesses:
                counts[label, label] += 1
                continue
            touching = [g for g in wrong if g[0] < end and start < g[1]]
            other = touching[0][2] if touching else NONE
            counts[label, OTHER_ENDS if other == label else other] += 1
        for start, end, label in wrong:
            if not any(g[0] < end and start < g[1] for g in true):
                counts[NONE, label] += 1
    types = [*labels, *sorted({found for _, found in counts} - {*labels, NONE, OTHER_ENDS})]
    columns = (*types, OTHER_ENDS, NONE)
    return columns, tuple(tuple(counts[row, column] for column in columns) for row in (*labels, NONE))


def f1_intervals(
    gold: Sequence[Sequence[str]], found: Sequence[Sequence[str]], labels: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """Type or "micro" -> the 95% percentile bootstrap interval of F1 over sentences (Efron, 1979)."""
    import numpy as np

    names = (*labels, "micro")
    counts = np.zeros((len(gold), len(names), 2))  # per sentence and type: correct ones, and gold plus predicted ones
    for row, (gold_tags, found_tags) in enumerate(zip(gold, found, strict=True)):
        true, guesses = set(spans(gold_tags)), set(spans(to_bio(found_tags, "bio", repair=True)))
        for column, name in enumerate(names):
            mine = [{e for e in entities if name in ("micro", e[2])} for entities in (true, guesses)]
            counts[row, column] = len(mine[0] & mine[1]), len(mine[0]) + len(mine[1])
    rng, even = np.random.default_rng(SEED), np.full(len(gold), 1 / len(gold))
    hundreds = (rng.multinomial(len(gold), even, size=100) for _ in range(RESAMPLES // 100))
    totals = np.concatenate([np.tensordot(drawn, counts, 1) for drawn in hundreds])
    f1 = 2 * totals[..., 0] / np.maximum(totals[..., 1], 1)
    low, high = np.percentile(f1, [2.5, 97.5], axis=0)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(names)}
