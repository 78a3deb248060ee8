"""Entity scores, compared with a count by hand; kinds of mistakes."""

import random

import pytest

from posttrain.ner.metrics import as_lines, entity_scores, mistakes
from posttrain.ner.tags import spans, to_bio

TRUE = [
    ["B-PER", "I-PER", "O", "B-LOC"],
    ["B-ORG", "I-ORG", "O", "B-PER"],
    ["O", "O", "B-LOC", "I-LOC"],
    ["O", "B-LOC"],
]
FOUND = [
    ["B-PER", "I-PER", "O", "B-ORG"],  # LOC read as ORG
    ["B-ORG", "O", "O", "B-PER"],  # ORG with wrong boundaries
    ["B-PER", "O", "I-LOC", "I-LOC"],  # a spurious PER; the LOC is right, by conlleval's reading
    ["O", "O"],  # LOC missed
]
WORDS = [
    ["Ada", "Lovelace", "in", "Rome"],
    ["Acme", "Works", "hired", "Alan"],
    ["The", "old", "New", "York"],
    ["to", "Oslo"],
]
ORIGINS = [f"t.conll, line {n}" for n in (1, 6, 11, 16)]


def test_entities_are_right_in_type_and_both_ends():
    scores = entity_scores(TRUE, FOUND)
    assert scores["PER"] == {"precision": 2 / 3, "recall": 1.0, "f1": 0.8, "support": 2}
    assert scores["LOC"] == {"precision": 1.0, "recall": 1 / 3, "f1": 0.5, "support": 3}
    assert scores["ORG"]["f1"] == 0
    assert scores["micro"] == pytest.approx({"precision": 3 / 6, "recall": 3 / 6, "f1": 0.5, "support": 6})


def test_scores_agree_with_a_count_of_spans():
    rng = random.Random(0)
    tags = ["O", "B-A", "I-A", "B-B", "I-B"]
    draw = [[rng.choice(tags) for _ in range(9)] for _ in range(60)]
    true = [to_bio(t, "bio", repair=True) for t in draw]
    found = [[t if rng.random() < 0.8 else rng.choice(tags) for t in row] for row in true]
    gold = {(i, s) for i, row in enumerate(true) for s in spans(row)}
    guess = {(i, s) for i, row in enumerate(found) for s in spans(to_bio(row, "bio", repair=True))}
    right = len(gold & guess)
    micro = entity_scores(true, found)["micro"]
    assert micro["precision"] == pytest.approx(right / len(guess))
    assert micro["recall"] == pytest.approx(right / len(gold))


def test_mistakes_have_a_kind_a_count_and_the_first_occurrence():
    found = {m.kind: (m.count, m.example, m.origin) for m in mistakes(WORDS, TRUE, FOUND, ORIGINS)}
    assert found == {
        "LOC read as ORG": (1, "Rome", "t.conll, line 1"),
        "ORG: wrong boundaries": (1, "Acme Works", "t.conll, line 6"),
        "spurious PER": (1, "The", "t.conll, line 11"),
        "LOC missed": (1, "Oslo", "t.conll, line 16"),
    }
    twice = mistakes(WORDS * 2, TRUE * 2, [[tag for tag in row] for row in FOUND] + TRUE, ORIGINS * 2, most=2)
    assert [m.count for m in twice] == [1, 1]
    assert mistakes(WORDS, TRUE, TRUE, ORIGINS) == []
    beside = mistakes([["a", "b", "c"]], [["O", "B-LOC", "O"]], [["B-PER", "O", "B-ORG"]], ORIGINS)
    assert [m.kind for m in beside] == ["LOC missed", "spurious PER", "spurious ORG"]


def test_the_table_ends_with_the_micro_average():
    lines = as_lines(entity_scores(TRUE, FOUND))
    assert [line.split()[0] for line in lines] == ["precision", "LOC", "ORG", "PER", "micro"]
    assert lines[-1].split() == ["micro", "50.0%", "50.0%", "50.0%", "6"]
