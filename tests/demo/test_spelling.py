"""The demo's data: no word of the test is ever trained on."""

import importlib.metadata
import json
from pathlib import Path

import pytest

from posttrain.demo import spelling as demo
from posttrain.errors import DataError


def test_read_typos_takes_single_word_fixes_only():
    text = "recieve->receive\nteh->the, tech\nfoo bar->foobar\nadn->and\nx->it's\nrecive->receive\n"
    assert demo.read_typos(text) == {"receive": ["recieve", "recive"]}


def test_an_unusable_dictionary_is_refused():
    with pytest.raises(DataError, match="no line of the form"):
        demo.read_typos("nothing here\n")


def test_splits_share_no_word():
    path = importlib.metadata.distribution("codespell").locate_file("codespell_lib/data/dictionary.txt")
    text = Path(str(path)).read_text(encoding="utf-8")
    splits = demo.split_by_word(demo.read_typos(text))
    words = {name: {w for _, w in rows} for name, rows in splits.items()}
    assert set(words) == {"train", "validation", "sample", "test"}
    assert len(words["test"]) == len(splits["test"]) == 1000
    for a in words:
        for b in words:
            assert a == b or not words[a] & words[b]
    assert splits == demo.split_by_word(demo.read_typos(text))


def test_an_interrupted_preparation_is_resumed(tmp_path, monkeypatch):
    """A kill left half a file and no marker: everything is written again; a second call finds it and writes nothing."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))  # every word is one token
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(demo, "MODEL_DIR", tmp_path / "model")
    monkeypatch.setattr(demo, "DATA_DIR", tmp_path / "data")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "te')
    said = []
    demo.prepare_data(said.append)
    rows = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    assert len(rows) > 10_000
    assert set(rows[0]) == {"prompt", "completion"}
    written = (tmp_path / "data" / "train.jsonl").stat().st_mtime_ns
    said.clear()
    demo.prepare_data(said.append)
    assert len(said) == 1
    assert "ready" in said[0]
    assert (tmp_path / "data" / "train.jsonl").stat().st_mtime_ns == written
