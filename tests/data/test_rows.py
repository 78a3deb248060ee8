"""Every accepted format is converted to TRL's columns; an invalid row is reported with file, row and field."""

import json

import pytest

from posttrain.config.sections import DataSettings
from posttrain.data.rows import FORMATS, fingerprint, load_rows
from posttrain.errors import DataError

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}

GOOD = {
    "text": ("sft", {"text": "a b"}, {"text": "a b"}),
    "messages": ("sft", {"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT]}),
    "prompt_completion": ("sft", {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}),
    "alpaca": (
        "sft",
        {"instruction": "say", "input": "x", "output": "y"},
        {
            "prompt": [{"role": "user", "content": "say\n\nx"}],
            "completion": [{"role": "assistant", "content": "y"}],
        },
    ),
    "sharegpt": (
        "sft",
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"messages": [USER, ASSISTANT]},
    ),
    "preference": (
        "dpo",
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ),
    "prompt": ("sample", {"prompt": [USER]}, {"prompt": [USER]}),
}


def write(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def load(path, recipe="sft", **settings):
    return load_rows(path, recipe, DataSettings(**settings), key="train_file")


@pytest.mark.parametrize("name", GOOD)
def test_each_format_is_converted_to_trls_columns(tmp_path, name):
    recipe, row, expected = GOOD[name]
    rows = load(write(tmp_path / "a.jsonl", [row]), recipe)
    assert rows.rows == [expected]


def test_every_format_has_an_example():
    assert set(GOOD) | {"unpaired"} == set(FORMATS)


def test_an_implicit_prompt_is_extracted(tmp_path):
    row = {"chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "no"}]}
    assert load(write(tmp_path / "a.jsonl", [row]), "reward").format == "preference"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a", ', r"row 2: broken JSON at column"),
        ({"prompt": "a"}, r"row 2: field 'completion' is missing"),
        ({"prompt": "a", "completion": " "}, r"row 2: completion: is empty"),
        ({"prompt": "a", "completion": 3}, r"row 2: completion: expected text, got int"),
        ({"prompt": [USER], "completion": "x"}, r"must both be text or both be messages"),
        ({"prompt": [USER, USER], "completion": [ASSISTANT]}, r"prompt\[1\].role: expected 'assistant', got 'user'"),
        ({"prompt": [USER], "completion": [{"role": "assistant", "content": ["x"]}]}, r"content: expected text"),
        (
            {"prompt": [USER, {"role": "system", "content": ""}], "completion": [ASSISTANT]},
            r"system turn is allowed only at the beginning",
        ),
        ({"prompt": [USER, ASSISTANT], "completion": [ASSISTANT]}, r"prompt: must end with a turn of 'user'"),
        ("[1]", r"row 2: expected an object"),
    ],
)
def test_an_invalid_row_is_refused_with_its_field(tmp_path, row, message):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}, row])
    with pytest.raises(DataError, match=message):
        load(path)
    kept = load(path, on_bad_row="skip")
    assert (len(kept), kept.skipped) == (1, 1)


def test_errors_are_collected_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": ""}] * 30)
    with pytest.raises(DataError) as caught:
        load(path)
    text = str(caught.value)
    assert "30 of 30 rows" in text
    assert "row 20:" in text
    assert "row 21:" not in text
    assert "and 10 more" in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a.jsonl is empty"),
        ("a.jsonl", b"\n\n", r"has no rows"),
        ("a.txt", b"x", r"unknown file type"),
        ("a.jsonl", b'{"text": "\xff"}', r"row 1: not UTF-8"),
        ("a.jsonl", b'{"x": 1}', r"columns \['x'\] match no known format"),
        ("a.json", b"{", r"broken JSON"),
        ("a.csv", b"prompt,completion\na\n", r"cells"),
        ("a.parquet", b"nonsense", r"not readable as Parquet"),
        ("a.jsonl.gz", b"nonsense", r"damaged gzip"),
    ],
)
def test_an_invalid_file_is_refused_with_its_path(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(str(tmp_path / name))


def test_a_missing_file_is_refused_with_its_path(tmp_path):
    with pytest.raises(DataError, match=r"train_file: .*none.jsonl does not exist"):
        load(str(tmp_path / "none.jsonl"))


def test_a_format_that_the_recipe_cannot_use_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"text rows cannot train dpo, which takes preference"):
        load(path, "dpo")


def test_a_mixture_has_the_shares_of_its_weights(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": str(i)} for i in range(100)])
    source = [{"path": str(tmp_path / "a.jsonl"), "weight": 3}, {"path": str(tmp_path / "b.jsonl"), "weight": 1}]
    rows = load(source)
    names = [r["prompt"] for r in rows.rows]
    assert (names.count("a"), names.count("b")) == (100, 33)
    assert len({json.dumps(r) for r in rows.rows}) == len(rows)
    assert load(source).fingerprint == rows.fingerprint


def test_fingerprint_depends_on_order_and_content():
    a, b = {"text": "a"}, {"text": "b"}
    assert len({fingerprint(r) for r in ([a, b], [b, a], [a], [a, a])}) == 4
