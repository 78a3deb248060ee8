"""Rows of tokens and tags, or of texts and spans; an invalid row is reported with row and field."""

import json
import random
import re

import pytest

from posttrain.config.sections import NerDataSettings
from posttrain.errors import DataError
from posttrain.ner.reading import load_sentences
from posttrain.ner.rows import split_words
from posttrain.ner.tags import spans

from .loading import load, pairs, rows

TOKENS = {"tokens": ["EU", "says"], "tags": ["B-ORG", "O"]}


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        (TOKENS, {}),
        ({"tokens": ["EU", "says"], "ner_tags": ["S-ORG", "O"], "pos_tags": [1, 2]}, {}),
        ({"tokens": ["EU", "says"], "labels": ["I-ORG", "O"]}, {}),
        (
            {"words": ["EU", "says"], "tags": [3, 4], "fine": ["B-ORG", "O"]},
            {"tokens_key": "words", "tags_key": "fine"},
        ),
        ({"text": "EU says", "entities": [{"start": 0, "end": 2, "label": "ORG"}]}, {}),
        ({"text": "EU says", "entities": [{"start": 0, "end": 2, "type": "ORG", "text": "EU"}]}, {}),
        ({"text": "EU says", "spans": [{"start": 0, "end": 3, "entity": "ORG", "score": 1}]}, {}),
        ({"text": "EU says", "label": [[0, 2, "ORG"]]}, {}),
        ({"text": "EU says", "labels": [[0, 2, "ORG"]]}, {"tag_scheme": "bmes"}),
        ({"body": "EU says", "marks": [[0, 2, "ORG"]], "label": 3}, {"text_key": "body", "spans_key": "marks"}),
        # Prodigy writes both: its tokens have no tags.
        (
            {"text": "EU says", "tokens": [{"text": "EU", "id": 0}], "spans": [{"start": 0, "end": 2, "label": "ORG"}]},
            {},
        ),
    ],
)
def test_each_row_layout_is_read(tmp_path, row, settings):
    found = load(tmp_path, rows(row), "a.jsonl", **settings)
    assert pairs(found) == ["EU/B-ORG says/O"]
    assert found.sentences[0].origin == f"{tmp_path / 'a.jsonl'}, row 1"
    assert found.fingerprint == load(tmp_path, json.dumps([row]), "a.json", **settings).fingerprint


def test_rows_with_spans_do_not_decide_the_tagging_scheme(tmp_path):
    text = rows({"tokens": ["a", "b", "c"], "tags": ["B-X", "M-X", "E-X"]}, {"text": "a b", "spans": [[0, 3, "Y"]]})
    found = load(tmp_path, text, "a.jsonl")
    assert (found.scheme, pairs(found)) == ("bmes", ["a/B-X b/I-X c/I-X", "a/B-Y b/I-Y"])


def test_parquet_rows_are_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([TOKENS]), tmp_path / "a.parquet")
    assert pairs(load_sentences(str(tmp_path / "a.parquet"), NerDataSettings(), key="x")) == ["EU/B-ORG says/O"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"tokens": [', r"broken JSON at column"),
        ("[1]", r"expected an object with named fields, got list"),
        (
            {"words": ["a"]},
            r"the fields \['words'\] hold neither tokens with tags, ner_tags or labels, nor text with ent",
        ),
        ({"tokens": [], "tags": []}, r"tokens: is empty"),
        ({"tokens": ["a", ""], "tags": ["O", "O"]}, r"tokens\[1\]: is empty"),
        ({"tokens": ["a", 3], "tags": ["O", "O"]}, r"tokens\[1\]: expected text, got int 3$"),
        ({"tokens": "a b", "tags": ["O"]}, r"tokens: expected a list, got str 'a b'"),
        ({"tokens": ["a"], "tags": [0]}, r"tags\[0\]: expected text, got int 0; write the tag's name for its number"),
        ({"tokens": ["a", "b"], "tags": ["O"]}, r"2 tokens, but 1 tag in tags"),
        ({"tokens": ["a"], "tags": ["O"], "ner_tags": ["O"]}, r"fields tags, ner_tags; choose one with tags_key"),
        ({"tokens": ["a"], "tags": ["X"]}, r"token 1: 'X' is not a tag of scheme bio"),
        ({"text": "a", "spans": [], "label": []}, r"fields spans, label; choose one with spans_key"),
        ({"text": " \n", "spans": []}, r"text: is empty"),
        ({"text": "a", "spans": None}, r"spans: expected a list of spans, got None"),
        (
            {"text": "a", "spans": ["PER"]},
            r"spans\[0\]: expected \{start, end, label\|type\|entity\} or \[start, end, la",
        ),
        ({"text": "a", "spans": [[0, 1, ""]]}, r"spans\[0\]: expected .* got \[0, 1, ''\]"),
        ({"text": "a", "spans": [[0, True, "X"]]}, r"spans\[0\]: expected"),
        ({"text": "a", "spans": [{"start": 0, "end": 1}]}, r"spans\[0\]: expected"),
        ({"text": "a", "spans": [{"start": 0, "end": 1, "label": "X", "type": "Y"}]}, r"spans\[0\]: expected"),
        (
            {"text": "a b", "spans": [[2, 3, "X"], [1, 4, "X"]]},
            r"spans\[1\]: \[1, 4, 'X'\] is not within .* 3 characters",
        ),
        ({"text": "a", "spans": [[-1, 1, "X"]]}, r"is not within"),
        ({"text": "abc", "spans": [[2, 1, "X"]]}, r"is not within the text"),
        ({"text": "a", "spans": [[1, 1, "X"]]}, r"spans\[0\]: \[1, 1, 'X'\] is empty: its text is ''"),
        ({"text": "a b", "spans": [[1, 2, "X"]]}, r"spans\[0\]: .* is empty: its text is ' '"),
        (
            {"text": "über a", "spans": [{"start": 5, "end": 6, "label": "X", "text": "b"}]},
            r"spans\[0\]: its text is 'b', but characters 5 to 6 are 'a'; offsets count characters, not bytes",
        ),
        (
            {"text": "New York City", "spans": [[4, 13, "A"], [0, 8, "B"]]},
            r"spans: \[4, 13, 'A'\] overlaps \[0, 8, 'B'\]; one tag per token cannot hold both",
        ),
        ({"text": "New York", "spans": [[0, 3, "A"], [2, 8, "B"]]}, r"spans: \[2, 8, 'B'\] overlaps \[0, 3, 'A'\]"),
        ({"text": "New York", "spans": [[0, 3, "A"], [0, 3, "A"]]}, r"spans: \[0, 3, 'A'\] overlaps \[0, 3, 'A'\]"),
    ],
)
def test_an_invalid_row_is_refused_with_its_field(tmp_path, row, message):
    content = rows(TOKENS, row)
    with pytest.raises(DataError, match=re.compile(message, re.MULTILINE)) as caught:
        load(tmp_path, content, "a.jsonl")
    assert "1 of 2 rows cannot be used:\n" in str(caught.value)
    assert "a.jsonl, row 2: " in str(caught.value)
    assert "on_bad_row: skip" in str(caught.value)
    kept = load(tmp_path, content, "a.jsonl", on_bad_row="skip")
    assert (len(kept), kept.skipped) == (1, 1)


def test_a_boundary_inside_a_word_splits_it(tmp_path):
    row = {"text": "in preWorldWar-II times", "spans": [[6, 11, "A"], [11, 17, "B"]]}
    assert pairs(load(tmp_path, rows(row), "a.jsonl")) == ["in/O pre/O World/B-A War/B-B -/I-B II/I-B times/O"]


def test_no_span_of_a_text_is_lost(tmp_path):
    rng = random.Random(3)
    written, expected = [], []
    for _ in range(300):
        text = "".join(rng.choices("ab1_.-é\u0301 \u3000\n中の\u200d😀", k=rng.randint(1, 25)))
        marks, at = [], 0
        while at < len(text):
            end = rng.randint(at + 1, len(text))
            if rng.random() < 0.5 and text[at:end].strip():
                marks.append([at, end, rng.choice("XY")])
            at = end
        if marks:
            written.append({"text": text, "spans": marks})
            expected.append([("".join(text[a:b].split()), label) for a, b, label in marks])
    found = load(tmp_path, rows(*written), "a.jsonl")
    for sentence, row, entities in zip(found.sentences, written, expected, strict=True):
        assert "".join(sentence.tokens) == "".join(row["text"].split())
        assert [("".join(sentence.tokens[a:b]), label) for a, b, label in spans(sentence.tags)] == entities


# Words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \t\n", []),
        ("Peter's U.S. trip, 3.5%", ["Peter", "'", "s", "U", ".", "S", ".", "trip", ",", "3", ".", "5", "%"]),
        ("B2B snake_case", ["B2B", "snake", "_", "case"]),
        ("Ünïted Straße Москва", ["Ünïted", "Straße", "Москва"]),
        ("在北京2008年", ["在", "北", "京", "2008", "年"]),
        ("𠮷野家で", ["𠮷", "野", "家", "で"]),
        ("東京タワー", ["東", "京", "タ", "ワ", "ー"]),
        ("cafe\u0301s là", ["cafe\u0301s", "là"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627 \u0645", ["\u0645\u06cc\u200c\u062e\u0648\u0627", "\u0645"]),
        ("か\u3099x", ["か\u3099", "x"]),
        ("!\u0301x", ["!\u0301", "x"]),
        ("a\u00a0b\u3000c", ["a", "b", "c"]),
        ("❤\ufe0f\ufe0fok", ["❤\ufe0f\ufe0f", "ok"]),
    ],
)
def test_split_words(text, words):
    assert [text[start:end] for start, end in split_words(text)] == words


def test_cuts_split_only_inside_words():
    assert split_words("abc de", {0, 1, 3, 4, 5, 6, 99}) == [(0, 1), (1, 3), (4, 5), (5, 6)]
