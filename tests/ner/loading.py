"""Loads the sentences of a file written by a test, as text to compare."""

import json

from posttrain.config.sections import NerDataSettings
from posttrain.ner.reading import load_sentences


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
