"""Sources of every format become checked sentences; errors are collected, skipped or repaired."""

import pytest

from posttrain.config.sections import NerDataSettings
from posttrain.errors import DataError
from posttrain.ner.reading import check_against_train, load_hub_sentences, load_sentences
from posttrain.ner.sentences import Sentence, Sentences

from .loading import load, pairs, rows


def test_several_files_are_read_as_one_source(tmp_path):
    (tmp_path / "a.bio").write_text("a B-X\n")
    (tmp_path / "b.jsonl").write_text(rows({"text": "b c", "spans": [[2, 3, "Y"]]}))
    found = load_sentences([str(tmp_path / "a.bio"), tmp_path / "b.jsonl"], NerDataSettings(), key="train_file")
    assert pairs(found) == ["a/B-X", "b/O c/B-Y"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.conll", r"train_file: none.conll does not exist \(looked in /.*use dataset_name"),
        ([], r"train_file: the list of files is empty"),
        ([{"path": "a"}], r"train_file: expected a path or a list of paths, got \{'path': 'a'\}"),
        ("", r"expected a path or a list of paths, got ''"),
        (".", r"train_file: . is a folder; name the files in it"),
    ],
)
def test_a_source_that_is_not_a_file_is_refused(source, message):
    with pytest.raises(DataError, match=message):
        load_sentences(source, NerDataSettings(), key="train_file")


def test_errors_are_collected_and_counted(tmp_path):
    with pytest.raises(DataError) as caught:
        load(tmp_path, "a B-X\n\n" + "a I-X\nb\n\n" * 15 + "a I-X\n\n" * 15)
    text = str(caught.value)
    assert "30 of 31 rows cannot be used" in text
    assert text.count(": token 1: I-X") == 5
    assert "... and 10 more" in text
    assert "on_bad_row: skip" in text
    assert "on_bad_tags: repair" in text


def test_skipped_and_repaired_sentences_are_counted_separately(tmp_path):
    text = "a B-X\n\nb I-X\n\nc\n\nd I-X\ne PER\n"
    found = load(tmp_path, text, on_bad_row="skip", on_bad_tags="repair")
    assert (pairs(found), found.repaired, found.skipped) == (["a/B-X", "b/B-X"], 1, 2)
    with pytest.raises(DataError, match=r"2 of 4 rows.*\n.*line 3: token 1: I-X") as caught:
        load(tmp_path, text, on_bad_row="skip")  # does not apply to tags in an illegal order
    assert "on_bad_row" not in str(caught.value)
    with pytest.raises(DataError, match=r"every sentence is unusable.\n1 of 1 rows"):
        load(tmp_path, "a B-\n", on_bad_row="skip")


def test_a_scheme_can_be_forced(tmp_path):
    text = "a I-X\nb B-X\n\nc B-X\n"
    assert load(tmp_path, "a I-X\nb B-X\n").scheme == "iob1"
    with pytest.raises(DataError, match=r"line 1: token 1: I-X after the beginning"):
        load(tmp_path, text)
    with pytest.raises(DataError, match=r"line 4: token 1: B-X after the beginning.*iob1 expects I-X"):
        load(tmp_path, text, tag_scheme="iob1")


def test_only_a_train_file_needs_entities(tmp_path):
    found = load(tmp_path, "a O\n", key="validation_file")
    assert (found.labels(), found.tag_list()) == ([], ["O"])


# Hub


@pytest.fixture
def hub(monkeypatch):
    import datasets
    from datasets import ClassLabel, Dataset, Features, List, Value

    def provide(tags, feature):
        data = Dataset.from_dict(
            {"tokens": [["a", "b"]] * len(tags), "ner_tags": tags, "chunk_tags": [[-1, -1]] * len(tags)},
            features=Features(
                tokens=List(Value("string")), ner_tags=List(feature), chunk_tags=List(ClassLabel(names=["O"]))
            ),
        )
        monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: data)

    return provide, ClassLabel(names=["O", "B-X", "I-X"]), Value("string"), Value("int64")


def test_integer_tags_of_a_hub_dataset_are_decoded(hub):
    provide, labels, strings, integers = hub
    for tags, feature in (([[1, 2], [0, 1]], labels), ([["B-X", "I-X"], ["O", "B-X"]], strings)):
        provide(tags, feature)
        found = load_hub_sentences("some/data", None, "train", NerDataSettings(), key="train_file")
        assert pairs(found) == ["a/B-X b/I-X", "a/O b/B-X"]
        assert found.sentences[1].origin == "some/data (train), row 2"
    provide([[1, 2], [-1, 0]], labels)
    with pytest.raises(
        DataError, match=r"some/data \(test\), row 2: ner_tags: -1 is not a tag's number; known: 0 to 2"
    ):
        load_hub_sentences("some/data", None, "test", NerDataSettings(), key="test_file")
    provide([[1, 2]], integers)
    with pytest.raises(DataError, match=r"row 1: ner_tags\[0\]: expected text, got int 1"):
        load_hub_sentences("some/data", None, "train", NerDataSettings(), key="train_file")


def test_a_hub_dataset_that_cannot_be_loaded_is_reported():
    with pytest.raises(DataError, match=r"dataset_name: cannot load 'no/such' \(split 'train'\): .*use train_file"):
        load_hub_sentences("no/such", None, "train", NerDataSettings(), key="train_file")


# Train and the rest


def sentences(*tags):
    return Sentences([Sentence(["w"] * len(t.split()), t.split(), f"d, line {i}") for i, t in enumerate(tags)], "bio")


def test_unseen_types_are_refused_or_become_o():
    train, other = sentences("B-X I-X B-Y"), sentences("O B-X", "B-Z I-Z B-Z B-X I-X", "B-Z B-A O")
    with pytest.raises(DataError) as caught:
        check_against_train(train, other, key="validation_file")
    text = str(caught.value)
    assert "validation_file: entities of types that are not in train_file" in text
    assert "A (1, first in d, line 2); Z (3, first in d, line 1); train_file has X, Y" in text
    assert "on_unseen_tag: outside" in text
    assert other.sentences[1].tags == ["B-Z", "I-Z", "B-Z", "B-X", "I-X"]
    before = other.fingerprint
    assert check_against_train(train, other, key="validation_file", on_unseen_tag="outside") == 4
    assert [" ".join(s.tags) for s in other.sentences] == ["O B-X", "O O O B-X I-X", "O O O"]
    assert other.fingerprint != before
    assert check_against_train(train, other, key="validation_file") == 0


def test_fingerprint_depends_on_tokens_and_tags_but_not_on_the_scheme(tmp_path):
    def of(text):
        return load(tmp_path, text).fingerprint

    assert of("a B-X\n") == of("a S-X\n") == of("a I-X\n")
    assert len({of(t) for t in ("a B-X\n", "b B-X\n", "a B-Y\n", "a B-X\nb O\n", "a B-X\n\nb O\n")}) == 5
