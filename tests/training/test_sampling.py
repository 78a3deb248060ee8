"""Which completions become a pair."""

from posttrain.models.generation import Completion
from posttrain.training.sampling import best_against_worst


def drawn(*texts, cut=()):
    return [Completion(t, 1, t not in cut) for t in texts]


def test_graded_scores_give_the_widest_difference_first():
    pairs = best_against_worst(drawn("a", "b", "c"), [0.1, 0.9, 0.6])
    assert pairs == [("b", "a"), ("c", "a"), ("b", "c")]


def test_the_commonest_mistake_comes_first():
    pairs = best_against_worst(drawn("right", "often", "rare", "often"), [1, 0, 0, 0])
    assert pairs == [("right", "often"), ("right", "rare")]


def test_truncated_or_empty_completions_are_never_chosen():
    assert best_against_worst(drawn("cut", "other", cut=["cut"]), [1, 0]) == []
    assert best_against_worst(drawn("other", "cut", cut=["cut"]), [1, 0]) == [("other", "cut")]
    assert best_against_worst(drawn(" ", "b"), [1, 0]) == []
    assert best_against_worst(drawn("a", "b"), [1, 1]) == []
