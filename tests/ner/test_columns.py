"""Column files as found on the web; an invalid sentence is reported with file and line."""

import gzip

import pytest

from posttrain.errors import DataError

from .loading import lines, load, pairs

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


def test_another_token_and_tag_column(tmp_path):
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
    with pytest.raises(DataError, match=r"line 1: 'a B-X' has 1 column separated by tabs"):
        load(tmp_path, "a B-X\nb\tO\n", separator="tab")


@pytest.mark.parametrize("separator", ["\t", " "])
def test_comments_are_skipped_and_hash_tokens_kept(tmp_path, separator):
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a B-X\nb\n", r"1 of 1 rows.*\n.*a.conll, line 1: line 2 has 1 column, expected 2 as in line 1: 'b'"),
        ("a\tO\nb c\n", r"line 2 has 1 column, expected 2"),
        ("a O\n\nb x B-X\n", r"a.conll, line 3: line 3 has 3 columns, expected 2 as in line 1: 'b x B-X'"),
        ("a\tB-X\n\u3000\nb\tO\n", r"line 2 has 1 column"),
        ("a\tB-X\n#hashtag\n", r"line 2 has 1 column, expected 2 as in line 1: '#hashtag'"),
        ("a\tB-X\n#hashtag\tPER\n", r"token 2: 'PER' is not a tag of scheme bio"),
        ("a\tB-X\n\tO\n", r"line 2 has no token: '\\tO'"),
        ("a\tB-X\nb\t\n", r"token 2: '' is not a tag of scheme bio"),
        (f"a B-X\n{'b' * 90}\n", rf"line 1: '{'b' * 59}\n"),
        (
            "a O\nb I-X\nc B-X\n\nd B-X\n",
            r"line 1: token 2: I-X after O; bio expects B-X.*\n.*on_bad_tags: repair. If the",
        ),
        (
            "a B-X\n\nb PER\n",
            r"line 3: token 1: 'PER' is not a tag of scheme bio, which has O, B-TYPE.*\n.*on_bad_row: skip",
        ),
    ],
)
def test_an_invalid_sentence_is_refused_with_its_line(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, content)
    assert str(caught.value).startswith(f"train_file: {tmp_path / 'a.conll'}: 1 of ")


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (b"", {}, r"a.conll is empty"),
        (b"\n \n-DOCSTART- O\n", {}, r"a.conll has no sentences"),
        (b"a O\nb O\n", {}, r"train_file: .*a.conll: no entity in it, only O; .*tag_column"),
        (
            b"a\nb\n",
            {},
            r"line 1: 'a' has 1 column separated by spaces, .* token_column 0 and tag_column -1; set these",
        ),
        (b"\na O\n", {"tag_column": 2}, r"line 2: 'a O' has 2 columns .* tag_column 2"),
        (b"a O\n", {"tag_column": -3}, r"which cannot hold token_column 0 and tag_column -3"),
        (b"a O\nb\xe9 B-X\n", {}, r"a.conll, line 2: not utf-8 \(byte 0xe9\); set encoding .*latin-1.*iconv"),
        (b"a O\n", {"encoding": "latin-one"}, r"encoding: Python does not know the encoding 'latin-one'"),
        (b"a B-X\nb I-X\nc M-X\n", {}, r"a.conll: the prefixes B, I, M match no scheme"),
        (b"a E-X\n", {"tag_scheme": "bio"}, r"token 1: 'E-X' is not a tag of scheme bio"),
    ],
)
def test_an_invalid_file_is_refused_with_its_path(tmp_path, content, settings, message):
    with pytest.raises(DataError, match=message):
        load(tmp_path, content, **settings)


def test_a_damaged_gzip_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"a.conll.gz: damaged gzip file"):
        load(tmp_path, b"nonsense", "a.conll.gz")


def test_another_encoding(tmp_path):
    assert pairs(load(tmp_path, b"caf\xe9 B-X\n\x85 O\n", encoding="latin-1")) == ["café/B-X \x85/O"]
