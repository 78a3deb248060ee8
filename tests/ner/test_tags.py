"""Every scheme is converted to the same BIO; illegal tags are reported, or repaired as conlleval reads them."""

import random

import pytest

from posttrain.errors import DataError
from posttrain.ner.tags import IllegalTransition, from_spans, recognise_scheme, spans, to_bio

# Two adjacent entities of one type, a single one, and one of another type directly after it, in every scheme.
BIO = ["B-PER", "I-PER", "B-PER", "O", "B-LOC", "B-ORG", "I-ORG", "I-ORG", "O"]
WRITTEN = {
    "bio": BIO,
    "iob1": ["I-PER", "I-PER", "B-PER", "O", "I-LOC", "I-ORG", "I-ORG", "I-ORG", "O"],
    "bioes": ["B-PER", "E-PER", "S-PER", "O", "S-LOC", "B-ORG", "I-ORG", "E-ORG", "O"],
    "bmes": ["B-PER", "E-PER", "S-PER", "O", "S-LOC", "B-ORG", "M-ORG", "E-ORG", "O"],
}


@pytest.mark.parametrize("scheme", WRITTEN)
def test_every_scheme_is_converted_to_the_same_bio(scheme):
    assert recognise_scheme([WRITTEN[scheme], ["O"]]) == scheme
    assert to_bio(WRITTEN[scheme], scheme, repair=False) == BIO
    assert to_bio(WRITTEN[scheme], scheme, repair=True) == BIO


def test_bilou_is_read_as_bioes():
    tags = ["B-PER", "L-PER", "U-PER", "O", "U-LOC", "B-ORG", "I-ORG", "L-ORG", "O"]
    assert recognise_scheme([tags]) == "bioes"
    assert to_bio(tags, "bioes", repair=False) == BIO


def test_io_joins_neighbours_of_one_type():
    tags = ["I-PER", "I-PER", "I-LOC", "O", "I-LOC"]
    assert recognise_scheme([tags]) == "io"
    assert to_bio(tags, "io", repair=False) == ["B-PER", "I-PER", "B-LOC", "O", "B-LOC"]


def test_types_may_have_dots_and_dashes():
    tags = ["B-PER.NOM", "I-PER.NOM", "B-GPE-LOC"]
    assert to_bio(tags, "bio", repair=False) == tags
    assert spans(tags) == [(0, 2, "PER.NOM"), (2, 3, "GPE-LOC")]


@pytest.mark.parametrize(
    ("sentences", "scheme"),
    [
        ([["O", "O"]], "bio"),
        ([["B-X", "O", "B-X"]], "bio"),
        ([["I-X", "B-X"], ["I-Y"]], "iob1"),
        # One I- after O in a bio file, and one B- after O in an iob1 file: a B- that separates nothing decides.
        ([["B-X", "I-X"], ["O", "I-X"]], "bio"),
        ([["I-X", "B-X"], ["O", "B-X"]], "bio"),
        ([["I-X", "B-Y"]], "bio"),
        ([["I-X"], ["B-X"]], "bio"),  # entities of different sentences are not adjacent
        ([["S-X"], ["B-X", "E-X"]], "bioes"),
        ([["B-X", "M-X", "E-X"]], "bmes"),
        ([["PER", "X-PER", "B-X"]], "bio"),  # text that is not a tag is reported by to_bio
    ],
)
def test_the_scheme_is_recognised(sentences, scheme):
    assert recognise_scheme(sentences) == scheme


def test_prefixes_of_two_schemes_are_refused():
    with pytest.raises(DataError, match=r"the prefixes B, I, M match no scheme; bio has B, I; .*tag_scheme"):
        recognise_scheme([["B-X", "I-X"], ["B-X", "M-X"]])


@pytest.mark.parametrize(
    ("scheme", "tags", "message", "repaired"),
    [
        ("bio", "O I-X", "token 2: I-X after O; bio expects B-X", "O B-X"),
        ("bio", "I-X", "token 1: I-X after the beginning of the sentence; bio expects B-X", "B-X"),
        ("bio", "B-X I-Y I-Y", "token 2: I-Y after B-X; bio expects B-Y", "B-X B-Y I-Y"),
        ("iob1", "O B-X I-X", "token 2: B-X after O; iob1 expects I-X", "O B-X I-X"),
        ("iob1", "I-Y B-X", "token 2: B-X after I-Y; iob1 expects I-X", "B-Y B-X"),
        ("bioes", "O I-X E-X", "token 2: I-X after O; bioes expects B-X or S-X, since no entity is open", "O B-X I-X"),
        ("bioes", "S-X E-X", "token 2: E-X after S-X; bioes expects B-X or S-X", "B-X B-X"),
        ("bioes", "B-X E-X I-X", "token 3: I-X after E-X; bioes expects B-X or S-X", "B-X I-X B-X"),
        ("bioes", "B-X E-Y", "token 2: E-Y after B-X; bioes expects I-X or E-X, since the entity is not c", "B-X B-Y"),
        ("bioes", "B-X I-X O", "token 3: O after I-X; bioes expects I-X or E-X", "B-X I-X O"),
        ("bioes", "B-X S-X", "token 2: S-X after B-X; bioes expects I-X or E-X", "B-X B-X"),
        ("bioes", "O B-X", "token 2: the end of the sentence after B-X; bioes expects I-X or E-X", "O B-X"),
        ("bioes", "U-X L-X", "token 2: L-X after U-X; bioes expects B-X or U-X", "B-X B-X"),
        ("bmes", "M-X E-X", "token 1: M-X after the beginning of the sentence; bmes expects B-X or S-X", "B-X I-X"),
        ("bmes", "B-X M-X B-X E-X", "token 3: B-X after M-X; bmes expects M-X or E-X", "B-X I-X B-X I-X"),
    ],
)
def test_illegal_tags_are_named_or_repaired(scheme, tags, message, repaired):
    with pytest.raises(IllegalTransition) as caught:
        to_bio(tags.split(), scheme, repair=False)
    assert message in str(caught.value)
    assert to_bio(tags.split(), scheme, repair=True) == repaired.split()


@pytest.mark.parametrize(
    "tag", ["PER", "X-PER", "B-", "B- ", "B-PER ", "B", "", "o", "b-PER", "PER-B", "B_PER", "M-PER"]
)
@pytest.mark.parametrize("repair", [False, True])
def test_a_tag_of_another_scheme_is_refused(tag, repair):
    with pytest.raises(DataError) as caught:
        to_bio(["O", tag], "bio", repair=repair)
    assert str(caught.value) == f"token 2: {tag!r} is not a tag of scheme bio, which has O, B-TYPE, I-TYPE"
    assert not isinstance(caught.value, IllegalTransition)


def random_spans(rng, length):
    found, at = [], 0
    while at < length:
        end = rng.randint(at + 1, min(at + 4, length))
        if rng.random() < 0.6:
            found.append((at, end, rng.choice(["PER", "LOC.NOM", "GPE-X"])))
        at = end
    return found


def write_as(scheme, length, entities):
    """Tags of entities in a scheme, written one entity at a time, independently of the tested conversion."""
    tags = ["O"] * length
    for n, (first, end, type_) in enumerate(entities):
        size = end - first
        if scheme in ("bioes", "bmes"):
            inside = "M" if scheme == "bmes" else "I"
            letters = "S" if size == 1 else "B" + inside * (size - 2) + "E"
        elif scheme == "iob1":
            touches = n > 0 and entities[n - 1][1:] == (first, type_)
            letters = ("B" if touches else "I") + "I" * (size - 1)
        else:
            letters = ("B" if scheme == "bio" else "I") + "I" * (size - 1)
        tags[first:end] = [f"{letter}-{type_}" for letter in letters]
    return tags


def joined(entities):
    result = []
    for first, end, type_ in entities:
        if result and result[-1][1:] == (first, type_):
            result[-1] = (result[-1][0], end, type_)
        else:
            result.append((first, end, type_))
    return result


def test_spans_round_trip_through_every_scheme():
    rng = random.Random(7)
    for _ in range(500):
        length = rng.randint(1, 20)
        entities = random_spans(rng, length)
        assert from_spans(length, entities) == write_as("bio", length, entities)
        assert spans(from_spans(length, entities)) == entities
        for scheme in ("bio", "iob1", "bioes", "bmes", "io"):
            tags = to_bio(write_as(scheme, length, entities), scheme, repair=False)
            assert spans(tags) == (joined(entities) if scheme == "io" else entities), scheme
            assert to_bio(tags, "bio", repair=False) == tags


@pytest.mark.parametrize(("scheme", "prefixes"), [("bio", "BI"), ("iob1", "BI"), ("bioes", "BIES"), ("io", "I")])
def test_repair_finds_the_entities_of_conlleval(scheme, prefixes):
    get_entities = pytest.importorskip("seqeval.metrics.sequence_labeling").get_entities
    rng = random.Random(11)
    choices = ["O", *(f"{prefix}-{type_}" for prefix in prefixes for type_ in ("PER", "LOC"))]
    for _ in range(2000):
        tags = rng.choices(choices, k=rng.randint(1, 12))
        expected = [(first, last + 1, type_) for type_, first, last in get_entities(tags)]
        repaired = to_bio(tags, scheme, repair=True)
        assert spans(repaired) == expected, tags
        assert to_bio(repaired, "bio", repair=False) == repaired
        if scheme == "bio":
            assert spans(tags) == expected, tags  # a model's output needs no repair
