"""A tagger's confusions, and intervals of F1."""

import random

import pytest

from posttrain.ner.metrics import entity_scores
from posttrain.report.entities import NONE, OTHER_ENDS, confusions, f1_intervals

LABELS = ("LOC", "ORG", "PER")


def as_table(gold, found):
    columns, counts = confusions(gold, found, LABELS)
    return {
        (row, c): n
        for row, line in zip((*LABELS, NONE), counts, strict=True)
        for c, n in zip(columns, line, strict=True)
        if n
    }


@pytest.mark.parametrize(
    ("gold", "found", "expected"),
    [
        ("B-PER I-PER O", "B-PER I-PER O", ("PER", "PER")),
        ("B-PER I-PER O", "B-ORG I-ORG O", ("PER", "ORG")),
        ("B-PER I-PER O", "B-PER O O", ("PER", OTHER_ENDS)),
        ("B-PER I-PER O", "O B-LOC I-LOC", ("PER", "LOC")),
        ("B-PER I-PER O", "O O O", ("PER", NONE)),
        ("O O O", "O B-LOC O", (NONE, "LOC")),
        ("O O B-ORG", "O O B-MISC", ("ORG", "MISC")),
    ],
)
def test_each_entity_is_counted_by_the_prediction_in_its_place(gold, found, expected):
    assert as_table([gold.split()], [found.split()]) == {expected: 1}


def sentences(seed, error):
    rng = random.Random(seed)
    gold = [[f"B-{rng.choice(LABELS)}" if rng.random() < 0.3 else "O" for _ in range(8)] for _ in range(120)]
    found = [[rng.choice(["O", "B-PER", "B-LOC"]) if rng.random() < error else t for t in tags] for tags in gold]
    return gold, found


def test_confusion_rows_sum_to_the_gold_entities():
    gold, found = sentences(0, 0.3)
    columns, counts = confusions(gold, found, LABELS)
    for label, line in zip(LABELS, counts, strict=False):
        assert sum(line) == sum(tag[2:] == label for tags in gold for tag in tags)
    scores = entity_scores(gold, found)
    for n, label in enumerate(LABELS):
        assert counts[n][columns.index(label)] / sum(counts[n]) == pytest.approx(scores[label]["recall"])


def test_an_interval_contains_seqevals_f1_and_narrows_with_more_sentences():
    gold, found = sentences(1, 0.2)
    scores = entity_scores(gold, found)
    few, many = f1_intervals(gold, found, LABELS), f1_intervals(gold * 16, found * 16, LABELS)
    for label in (*LABELS, "micro"):
        low, high = few[label]
        assert low < scores[label]["f1"] < high
        assert (high - low) / (many[label][1] - many[label][0]) == pytest.approx(4, rel=0.35)
    # The same by seqeval, one draw of sentences after the other.
    gold, found = gold[:30], found[:30]
    rng, drawn = random.Random(7), []
    for _ in range(400):
        rows = rng.choices(range(len(gold)), k=len(gold))
        drawn.append(entity_scores([gold[r] for r in rows], [found[r] for r in rows])["micro"]["f1"])
    drawn.sort()
    assert f1_intervals(gold, found, LABELS)["micro"] == pytest.approx((drawn[9], drawn[-10]), abs=0.015)
    assert f1_intervals(gold[:1] * 5, gold[:1] * 5, LABELS)["micro"] == (1.0, 1.0)
