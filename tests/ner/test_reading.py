"""Every format reads to the same sentences; what cannot be used is named by file, line or row, and field."""

import gzip
import json
import random
import re

import pytest

from posttrain.errors import DataError
from posttrain.ner.reading import (
    NerDataSettings,
    Sentence,
    Sentences,
    check_against_train,
    load_hub_sentences,
    load_sentences,
    split_words,
)
from posttrain.ner.tags import spans

CONLL2003 = """-DOCSTART- -X- -X- O

EU NNP B-NP I-ORG
rejects VBZ B-VP O
German JJ B-NP I-MISC
British JJ I-NP B-MISC
. . O O

Peter NNP B-NP I-PER
Blackburn NNP I-NP I-PER
-DOCSTART- -X- -X- O

BRUSSELS NNP B-NP I-LOC
"""
WNUT = '@paul\tO\n#london\tB-location\n"\tO\n#\tO\n\t\nEmpire\tB-location\nState\tI-location\n\t\t\nlol\tO'
WIKIGOLD = "-DOCSTART- O\n\n010 I-MISC\nis O\nthe O\nBerlin I-LOC\nParis I-LOC\n\n"
RESUME = "高 B-NAME\n勇 E-NAME\n\uff1a O\n男 S-GEN\n\n中 B-CONT\n国 M-CONT\n籍 E-CONT\n"
WEIBO = "科0\tB-ORG.NAM\n技1\tI-ORG.NAM\n他0\tB-PER.PRO\n10\tO\nab1\tO\n"


def load(tmp_path, content, name="a.conll", key="train_file", **settings):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_sentences(str(path), NerDataSettings(**settings), key=key)


def rows(*values):
    return "".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values)


def pairs(sentences):
    return [
        " ".join(f"{token}/{tag}" for token, tag in zip(s.tokens, s.tags, strict=True)) for s in sentences.sentences
    ]


def lines(sentences):
    return [int(s.origin.rpartition(", line ")[2]) for s in sentences.sentences]


# Columns


def test_conll_2003(tmp_path):
    found = load(tmp_path, CONLL2003, "eng.train")
    assert found.scheme == "iob1"
    assert pairs(found) == [
        "EU/B-ORG rejects/O German/B-MISC British/B-MISC ./O",
        "Peter/B-PER Blackburn/I-PER",
        "BRUSSELS/B-LOC",
    ]
    assert lines(found) == [3, 9, 13]
    assert found.sentences[0].origin == f"{tmp_path / 'eng.train'}, line 3"
    assert found.labels() == ["LOC", "MISC", "ORG", "PER"]
    assert found.tag_list()[:4] == ["O", "B-LOC", "I-LOC", "B-MISC"]
    assert (len(found), found.repaired, found.skipped) == (3, 0, 0)


def test_another_column(tmp_path):
    found = load(tmp_path, CONLL2003, token_column=1, tag_column=2)
    assert (found.scheme, pairs(found)[1]) == ("bio", "NNP/B-NP NNP/I-NP")


def test_wnut(tmp_path):
    found = load(tmp_path, WNUT, "emerging.test.txt")
    assert pairs(found) == ['@paul/O #london/B-location "/O #/O', "Empire/B-location State/I-location", "lol/O"]
    assert lines(found) == [1, 6, 9]


def test_wikigold(tmp_path):
    found = load(tmp_path, WIKIGOLD, "wikigold.txt")
    assert (found.scheme, pairs(found)) == ("io", ["010/B-MISC is/O the/O Berlin/B-LOC Paris/I-LOC"])


def test_resume(tmp_path):
    found = load(tmp_path, RESUME, "train.char.bmes")
    assert found.scheme == "bmes"
    assert pairs(found) == ["高/B-NAME 勇/I-NAME \uff1a/O 男/B-GEN", "中/B-CONT 国/I-CONT 籍/I-CONT"]


def test_weibo(tmp_path):
    assert pairs(load(tmp_path, WEIBO)) == ["科0/B-ORG.NAM 技1/I-ORG.NAM 他0/B-PER.PRO 10/O ab1/O"]
    stripped = load(tmp_path, WEIBO, strip_segmentation=True)
    assert pairs(stripped) == ["科/B-ORG.NAM 技/I-ORG.NAM 他/B-PER.PRO 10/O ab1/O"]


def test_gzip_bom_crlf_and_no_blank_line_at_the_end(tmp_path):
    expected = pairs(load(tmp_path, CONLL2003))
    assert pairs(load(tmp_path, gzip.compress(CONLL2003.encode()), "a.conll.gz")) == expected
    changed = b"\xef\xbb\xbf" + CONLL2003.strip().replace("\n", "\r\n").encode()
    assert pairs(load(tmp_path, changed)) == expected


@pytest.mark.parametrize("space", ["\u00a0", "\u3000", "\u200b", "\u2028", "\u0085", "\x1c", "a\u2028b", "\u00a0x"])
@pytest.mark.parametrize("separator", ["\t", " "])
def test_odd_white_space_is_a_token(tmp_path, space, separator):
    found = load(tmp_path, f"a{separator}B-X\n{space}{separator}I-X\nc{separator}O\n")
    assert [(s.tokens, s.tags) for s in found.sentences] == [(["a", space, "c"], ["B-X", "I-X", "O"])]


def test_tabs_keep_spaces_inside_a_token(tmp_path):
    found = load(tmp_path, "New York\tB-LOC\n \tO\nCity \tO \n")
    assert found.sentences[0].tokens == ["New York", " ", "City"]
    assert found.sentences[0].tags == ["B-LOC", "O", "O"]


def test_runs_of_spaces_are_one_separator(tmp_path):
    assert pairs(load(tmp_path, "EU   NNP B-ORG \n says VBZ   O\n  \nx y O\n")) == ["EU/B-ORG says/O", "x/O"]


def test_a_separator_can_be_forced(tmp_path):
    assert pairs(load(tmp_path, "a\tb B-X\nc\td O\n", separator="space")) == ["a\tb/B-X c\td/O"]
    with pytest.raises(DataError, match=r"line 1: 'a B-X' has 1 column parted by tabs"):
        load(tmp_path, "a B-X\nb\tO\n", separator="tab")


@pytest.mark.parametrize("separator", ["\t", " "])
def test_comments_go_and_hashes_stay(tmp_path, separator):
    text = (
        "# newdoc\n# sent_id = 3\n#begin document (bc/cctv); part 000\n#tag X B-X\n# X O\n# text = I am\n#x X I-X\n"
        "#end document\n"
    )
    with pytest.raises(DataError, match=r"token 3: I-X after O"):
        load(tmp_path, text.replace(" X ", f"{separator}X{separator}"))
    found = load(tmp_path, text.replace(" X ", f"{separator}X{separator}"), on_bad_tags="repair")
    assert pairs(found) == ["#tag/B-X #/O #x/B-X"]
    assert lines(found) == [4]


def test_a_comment_of_as_many_words_as_columns(tmp_path):
    assert pairs(load(tmp_path, "# newdoc\na B-X\n# O\n")) == ["a/B-X #/O"]


def test_docstart_ends_a_sentence(tmp_path):
    assert pairs(load(tmp_path, "a B-X\n-DOCSTART- O\nb B-X\n")) == ["a/B-X", "b/B-X"]


def test_multiconer(tmp_path):
    text = "# id 5b2e\tdomain=en\nthe _ _ O\nwho _ _ B-GRP\n\n# id 77\tdomain=en\nx _ _ O\n"
    assert pairs(load(tmp_path, text)) == ["the/O who/B-GRP", "x/O"]


def test_several_files(tmp_path):
    (tmp_path / "a.bio").write_text("a B-X\n")
    (tmp_path / "b.jsonl").write_text(rows({"text": "b c", "spans": [[2, 3, "Y"]]}))
    found = load_sentences([str(tmp_path / "a.bio"), tmp_path / "b.jsonl"], NerDataSettings(), key="train_file")
    assert pairs(found) == ["a/B-X", "b/O c/B-Y"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a B-X\nb\n", r"1 of 1 rows.*\n.*a.conll, line 1: line 2 has 1 column, expected 2 as in line 1: 'b'"),
        ("a\tO\nb c\n", r"line 2 has 1 column, expected 2"),
        ("a O\n\nb x B-X\n", r"a.conll, line 3: line 3 has 3 columns, expected 2 as in line 1: 'b x B-X'"),
        ("a\tB-X\n\u3000\nb\tO\n", r"line 2 has 1 column"),
        ("a\tB-X\n#hashtag\n", r"line 2 has 1 column, expected 2 as in line 1: '#hashtag'"),
        ("a\tB-X\n#hashtag\tPER\n", r"token 2: 'PER' is no tag of scheme bio"),
        ("a\tB-X\n\tO\n", r"line 2 has no token: '\\tO'"),
        ("a\tB-X\nb\t\n", r"token 2: '' is no tag of scheme bio"),
        (f"a B-X\n{'b' * 90}\n", rf"line 1: '{'b' * 59}\n"),
        (
            "a O\nb I-X\nc B-X\n\nd B-X\n",
            r"line 1: token 2: I-X after O; bio expects B-X.*\n.*on_bad_tags: repair. If the",
        ),
        (
            "a B-X\n\nb PER\n",
            r"line 3: token 1: 'PER' is no tag of scheme bio, which has O, B-TYPE.*\n.*on_bad_row: skip",
        ),
    ],
)
def test_a_broken_sentence_is_named(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, content)
    assert str(caught.value).startswith(f"train_file: {tmp_path / 'a.conll'}: 1 of ")


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (b"", {}, r"a.conll is empty"),
        (b"\n \n-DOCSTART- O\n", {}, r"a.conll has no sentences"),
        (b"a O\nb O\n", {}, r"train_file: .*a.conll: no entity in it, only O; .*tag_column"),
        (b"a\nb\n", {}, r"line 1: 'a' has 1 column parted by spaces, .* token_column 0 and tag_column -1; set these"),
        (b"\na O\n", {"tag_column": 2}, r"line 2: 'a O' has 2 columns .* tag_column 2"),
        (b"a O\n", {"tag_column": -3}, r"which cannot hold token_column 0 and tag_column -3"),
        (b"a O\nb\xe9 B-X\n", {}, r"a.conll, line 2: not utf-8 \(byte 0xe9\); set encoding .*latin-1.*iconv"),
        (b"a O\n", {"encoding": "latin-one"}, r"encoding: Python knows no encoding 'latin-one'"),
        (b"a B-X\nb I-X\nc M-X\n", {}, r"a.conll: the prefixes B, I, M make no scheme"),
        (b"a E-X\n", {"tag_scheme": "bio"}, r"token 1: 'E-X' is no tag of scheme bio"),
    ],
)
def test_a_broken_file_is_named(tmp_path, content, settings, message):
    with pytest.raises(DataError, match=message):
        load(tmp_path, content, **settings)


def test_a_damaged_gzip_file(tmp_path):
    with pytest.raises(DataError, match=r"a.conll.gz: damaged gzip file"):
        load(tmp_path, b"nonsense", "a.conll.gz")


def test_another_encoding(tmp_path):
    assert pairs(load(tmp_path, b"caf\xe9 B-X\n\x85 O\n", encoding="latin-1")) == ["café/B-X \x85/O"]


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
def test_a_source_that_is_no_file(source, message):
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


def test_skip_and_repair_are_counted_and_apart(tmp_path):
    text = "a B-X\n\nb I-X\n\nc\n\nd I-X\ne PER\n"
    found = load(tmp_path, text, on_bad_row="skip", on_bad_tags="repair")
    assert (pairs(found), found.repaired, found.skipped) == (["a/B-X", "b/B-X"], 1, 2)
    with pytest.raises(DataError, match=r"2 of 4 rows.*\n.*line 3: token 1: I-X") as caught:
        load(tmp_path, text, on_bad_row="skip")  # says nothing about illegal orders
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


# Rows

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
def test_rows(tmp_path, row, settings):
    found = load(tmp_path, rows(row), "a.jsonl", **settings)
    assert pairs(found) == ["EU/B-ORG says/O"]
    assert found.sentences[0].origin == f"{tmp_path / 'a.jsonl'}, row 1"
    assert found.fingerprint == load(tmp_path, json.dumps([row]), "a.json", **settings).fingerprint


def test_spans_have_no_say_in_the_scheme_of_tags(tmp_path):
    text = rows({"tokens": ["a", "b", "c"], "tags": ["B-X", "M-X", "E-X"]}, {"text": "a b", "spans": [[0, 3, "Y"]]})
    found = load(tmp_path, text, "a.jsonl")
    assert (found.scheme, pairs(found)) == ("bmes", ["a/B-X b/I-X c/I-X", "a/B-Y b/I-Y"])


def test_parquet(tmp_path):
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
        ({"tokens": ["a"], "tags": ["O"], "ner_tags": ["O"]}, r"fields tags, ner_tags may be meant; set tags_key"),
        ({"tokens": ["a"], "tags": ["X"]}, r"token 1: 'X' is no tag of scheme bio"),
        ({"text": "a", "spans": [], "label": []}, r"fields spans, label may be meant; set spans_key"),
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
            r"spans: \[4, 13, 'A'\] overlaps \[0, 8, 'B'\]; one tag a token cannot hold both",
        ),
        ({"text": "New York", "spans": [[0, 3, "A"], [2, 8, "B"]]}, r"spans: \[2, 8, 'B'\] overlaps \[0, 3, 'A'\]"),
        ({"text": "New York", "spans": [[0, 3, "A"], [0, 3, "A"]]}, r"spans: \[0, 3, 'A'\] overlaps \[0, 3, 'A'\]"),
    ],
)
def test_a_broken_row_is_named(tmp_path, row, message):
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


def test_hub(hub):
    provide, labels, strings, integers = hub
    for tags, feature in (([[1, 2], [0, 1]], labels), ([["B-X", "I-X"], ["O", "B-X"]], strings)):
        provide(tags, feature)
        found = load_hub_sentences("some/data", None, "train", NerDataSettings(), key="train_file")
        assert pairs(found) == ["a/B-X b/I-X", "a/O b/B-X"]
        assert found.sentences[1].origin == "some/data (train), row 2"
    provide([[1, 2], [-1, 0]], labels)
    with pytest.raises(DataError, match=r"some/data \(test\), row 2: ner_tags: -1 is no tag's number; known: 0 to 2"):
        load_hub_sentences("some/data", None, "test", NerDataSettings(), key="test_file")
    provide([[1, 2]], integers)
    with pytest.raises(DataError, match=r"row 1: ner_tags\[0\]: expected text, got int 1"):
        load_hub_sentences("some/data", None, "train", NerDataSettings(), key="train_file")


def test_a_hub_dataset_that_cannot_be_loaded():
    with pytest.raises(DataError, match=r"dataset_name: cannot load 'no/such' \(split 'train'\): .*use train_file"):
        load_hub_sentences("no/such", None, "train", NerDataSettings(), key="train_file")


# Train and the rest


def sentences(*tags):
    return Sentences([Sentence(["w"] * len(t.split()), t.split(), f"d, line {i}") for i, t in enumerate(tags)], "bio")


def test_unseen_types_stop_or_become_o():
    train, other = sentences("B-X I-X B-Y"), sentences("O B-X", "B-Z I-Z B-Z B-X I-X", "B-Z B-A O")
    with pytest.raises(DataError) as caught:
        check_against_train(train, other, key="validation_file")
    text = str(caught.value)
    assert "validation_file: entities of a type that train_file never has" in text
    assert "A (1, first in d, line 2); Z (3, first in d, line 1); train_file has X, Y" in text
    assert "on_unseen_tag: outside" in text
    assert other.sentences[1].tags == ["B-Z", "I-Z", "B-Z", "B-X", "I-X"]
    before = other.fingerprint
    assert check_against_train(train, other, key="validation_file", on_unseen_tag="outside") == 4
    assert [" ".join(s.tags) for s in other.sentences] == ["O B-X", "O O O B-X I-X", "O O O"]
    assert other.fingerprint != before
    assert check_against_train(train, other, key="validation_file") == 0


def test_fingerprint_sees_tokens_and_tags_and_not_the_scheme(tmp_path):
    def of(text):
        return load(tmp_path, text).fingerprint

    assert of("a B-X\n") == of("a S-X\n") == of("a I-X\n")
    assert len({of(t) for t in ("a B-X\n", "b B-X\n", "a B-Y\n", "a B-X\nb O\n", "a B-X\n\nb O\n")}) == 5
