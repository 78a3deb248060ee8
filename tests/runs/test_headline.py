"""The numbers that a finished stage is judged by, also those of a stage that version 0.1.0 wrote."""

from pathlib import Path

import pytest

from posttrain.config.recipes import RECIPES
from posttrain.intervals import Share, wilson
from posttrain.runs.card import body
from posttrain.runs.headline import headline
from posttrain.runs.lineage import Lineage, read_lineage
from posttrain.runs.tree import tree

OLD = Path(__file__).with_name("version_0_1_0")


def lineage(recipe, **metrics):
    return Lineage(stage="s", recipe=recipe, kind="adapter", key="k" * 64, config={}, metrics=metrics)


def test_a_run_of_the_version_before_is_read():
    old = read_lineage(OLD)
    assert old.versions["posttrain"] == "0.1.0"
    greedy, sampled = headline(old)
    assert (greedy.title, greedy.value) == ("exact match, greedy, 500 rows", "40.2% [36.0, 44.6]")
    assert greedy.change.mean == pytest.approx(old.metrics["change"]["greedy_exact"])
    assert sampled.verdict == "better"
    assert "completions that end by EOS" in [m.name for m in headline(old, details=True)]
    assert greedy.title in tree(OLD)[1]
    assert f"| {greedy.title} | 0.0% \\[0.0, 0.8\\] | 40.2% \\[36.0, 44.6\\] |" in body(old)


def test_each_kind_of_measure():
    (accuracy,) = headline(lineage("reward", held_out_accuracy=0.75, held_out_pairs=40))
    assert accuracy.after == wilson(30, 40)
    assert accuracy.title == "held-out pairs ranked right, 40 pairs"
    (pairs,) = headline(lineage("sample", pairs=391, prompts=1000, mean_score=0.25))
    assert (pairs.title, pairs.value) == ("preference pairs from 1,000 prompts", "391")
    (f1,) = headline(lineage("ner", f1=0.989, sentences=500, measured_on="validation", precision=0.99, recall=0.98))
    assert (f1.value, f1.split) == ("98.9%", "validation")
    exact = {"rows": 2, "greedy_exact": 0.5, "greedy_exact_low": 0.1, "greedy_exact_high": 0.9}
    greedy, kl = headline(lineage("ppo", after=exact, **{"objective/kl": 0.1234}))
    assert greedy.after == Share(0.5, 0.1, 0.9, 2) and greedy.change is None and greedy.verdict == ""
    assert (kl.title, kl.value) == ("KL from its start, nats per completion", "0.123")


def test_nothing_is_made_up():
    for recipe in RECIPES:
        assert headline(lineage(recipe), details=True) == []
    assert headline(lineage("a recipe of tomorrow", f1=1.0)) == []
