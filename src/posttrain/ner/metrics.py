"""Precision, recall and F1 of entities by seqeval, and the most frequent mistakes.

An entity is correct if its type and both ends are (Tjong Kim Sang and De Meulder, 2003). Predicted tags in an
illegal order are read as conlleval reads them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .tags import spans, to_bio


def entity_scores(true: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, dict[str, float]]:
    """Type -> {precision, recall, f1, support}, and "micro" over all types. Sentences are lists of BIO tags."""
    import warnings

    from seqeval.metrics import classification_report

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a type that was never predicted has precision 0, which its row shows
        report = classification_report(
            [list(t) for t in true], [list(f) for f in found], output_dict=True, zero_division=0
        )
    names = {"micro avg": "micro", **{name: name for name in report if not name.endswith(" avg")}}
    return {
        new: {
            "precision": float(report[old]["precision"]), "recall": float(report[old]["recall"]),
            "f1": float(report[old]["f1-score"]), "support": int(report[old]["support"]),
        }
        for old, new in names.items()
    }  # fmt: skip


@dataclass(frozen=True)
class Mistake:
    """A kind of mistake, its count, and its first occurrence."""

    kind: str  # "PER missed", "ORG read as LOC", "PER: wrong boundaries", "spurious LOC"
    count: int
    example: str
    origin: str


def mistakes(
    words: Sequence[Sequence[str]],
    true: Sequence[Sequence[str]],
    found: Sequence[Sequence[str]],
    origins: Sequence[str],
    *,
    most: int = 10,
) -> list[Mistake]:
    """The mistakes, most frequent first. Each wrong entity is one, classified by what overlaps it, if anything."""
    counts: Counter[str] = Counter()
    first: dict[str, tuple[str, str]] = {}

    def note(kind: str, sentence: int, start: int, end: int) -> None:
        counts[kind] += 1
        first.setdefault(kind, (" ".join(words[sentence][start:end]), origins[sentence]))

    for sentence, (gold_tags, found_tags) in enumerate(zip(true, found, strict=True)):
        gold, guesses = set(spans(gold_tags)), set(spans(to_bio(found_tags, "bio", repair=True)))
        wrong = sorted(guesses - gold)
        for start, end, label in sorted(gold - guesses):
            touching = [g for g in wrong if g[0] < end and start < g[1]]
            if not touching:
                note(f"{label} missed", sentence, start, end)
                continue
            as_type = touching[0][2]
            kind = f"{label}: wrong boundaries" if as_type == label else f"{label} read as {as_type}"
            note(kind, sentence, start, end)
        for start, end, label in wrong:
            if not any(g[0] < end and start < g[1] for g in gold):
                note(f"spurious {label}", sentence, start, end)
    return [Mistake(kind, count, *first[kind]) for kind, count in counts.most_common(most)]


def as_lines(scores: dict[str, dict[str, float]]) -> list[str]:
    """The scores as a table for people, the micro average last."""
    width = max(map(len, scores))
    lines = [f"{'':<{width}}  precision  recall     F1  entities"]
    for name in [*sorted(n for n in scores if n != "micro"), "micro"]:
        s = scores[name]
        lines.append(f"{name:<{width}}  {s['precision']:9.1%}  {s['recall']:6.1%} {s['f1']:6.1%}  {s['support']:8}")
    return lines
