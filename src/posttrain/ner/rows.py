"""Rows of named fields: tokens with one tag each, or a text with character spans, which become tags of its words."""

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..config.sections import NerDataSettings
from ..data.conversation import Row, require_text
from ..data.files import BrokenRow, read_rows
from ..errors import DataError
from .sentences import RawSentence, counted
from .tags import from_spans

ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
TAGS_KEYS = ("tags", "ner_tags", "labels")
_SPANS_KEYS = ("entities", "spans", "label", "labels")
_TYPE_KEYS = ("label", "type", "entity")


def read_row_file(path: Path, settings: NerDataSettings) -> list[RawSentence]:
    """The sentences of a .json, .jsonl or .parquet file; those that cannot be used have a `problem`."""
    return [read_row(f"{path}, row {number}", row, settings) for number, row in read_rows(path)]


def read_row(origin: str, row: Any, settings: NerDataSettings) -> RawSentence:
    """One row as a sentence; if it cannot be used, `problem` says which field is wrong, and why."""
    try:
        if isinstance(row, BrokenRow):
            raise DataError(str(row))
        if not isinstance(row, dict):
            raise DataError(f"expected an object with named fields, got {type(row).__name__}")
        if settings.tokens_key in row and (key := _present(row, settings.tags_key, TAGS_KEYS, "tags_key")):
            return RawSentence(origin, *_tagged_tokens(row, settings.tokens_key, key))
        if settings.text_key in row and (key := _present(row, settings.spans_key, _SPANS_KEYS, "spans_key")):
            return RawSentence(origin, *_tagged_text(row, settings.text_key, key), is_bio=True)
        raise DataError(
            f"the fields {sorted(row)} hold neither {settings.tokens_key} with {settings.tags_key or _or(TAGS_KEYS)}, "
            f"nor {settings.text_key} with {settings.spans_key or _or(_SPANS_KEYS)}; rename them, or set tokens_key "
            "and tags_key, or text_key and spans_key"
        )
    except DataError as error:
        return RawSentence(origin, problem=str(error))


def _present(row: Row, chosen: str | None, known: Sequence[str], setting: str) -> str | None:
    """The field to read: the chosen one, or the only known one; None if the row has neither."""
    found = [name for name in ([chosen] if chosen else known) if name in row]
    if len(found) > 1:
        raise DataError(f"the row has the fields {', '.join(found)}; choose one with {setting}")
    return found[0] if found else None


def _tagged_tokens(row: Row, tokens_key: str, tags_key: str) -> tuple[list[str], list[str]]:
    tokens, tags = row[tokens_key], row[tags_key]
    for name, values in ((tokens_key, tokens), (tags_key, tags)):
        if not isinstance(values, list):
            raise DataError(f"{name}: expected a list, got {type(values).__name__} {values!r:.60}")
        if not values:
            raise DataError(f"{name}: is empty")
        for i, value in enumerate(values):
            if not isinstance(value, str):
                raise DataError(
                    f"{name}[{i}]: expected text, got {type(value).__name__} {value!r:.60}"
                    + ("; write the tag's name for its number" if name == tags_key and type(value) is int else "")
                )
    if "" in tokens:
        raise DataError(f"{tokens_key}[{tokens.index('')}]: is empty")
    if len(tokens) != len(tags):
        raise DataError(f"{counted(len(tokens), 'token')}, but {counted(len(tags), 'tag')} in {tags_key}")
    return tokens, tags


def _tagged_text(row: Row, text_key: str, spans_key: str) -> tuple[list[str], list[str]]:
    """The words of a text, with BIO tags of its character spans."""
    text = require_text(row[text_key], text_key)
    if not isinstance(row[spans_key], list):
        raise DataError(f"{spans_key}: expected a list of spans, got {row[spans_key]!r:.60}")
    marked = sorted(_span(entry, text, f"{spans_key}[{i}]") for i, entry in enumerate(row[spans_key]))
    for (start, end, label), (next_start, next_end, next_label) in pairwise(marked):
        if next_start < end:
            raise DataError(
                f"{spans_key}: [{next_start}, {next_end}, {next_label!r}] overlaps [{start}, {end}, {label!r}]; "
                "one tag per token cannot hold both: keep one"
            )
    words = split_words(text, {offset for start, end, _ in marked for offset in (start, end)})
    starts, ends = [start for start, _ in words], [end for _, end in words]
    # After the cuts every word is either inside a span or outside. A span may begin or end with white space.
    entities = [(bisect_left(starts, start), bisect_right(ends, end), label) for start, end, label in marked]
    return [text[start:end] for start, end in words], from_spans(len(words), entities)


def _span(entry: Any, text: str, name: str) -> tuple[int, int, str]:
    said = None
    if isinstance(entry, dict):
        labels = [entry[key] for key in _TYPE_KEYS if key in entry]
        start, end, label = entry.get("start"), entry.get("end"), labels[0] if len(labels) == 1 else None
        said = entry.get("text")
    elif isinstance(entry, list) and len(entry) == 3:
        start, end, label = entry
    else:
        start = end = label = None
    if type(start) is not int or type(end) is not int or not isinstance(label, str) or not label.strip():
        raise DataError(
            f"{name}: expected {{start, end, {'|'.join(_TYPE_KEYS)}}} or [start, end, label], with offsets in "
            f"characters, got {entry!r:.80}"
        )
    if not 0 <= start <= end <= len(text):
        raise DataError(f"{name}: {entry!r:.80} is not within the text of {counted(len(text), 'character')}")
    if not text[start:end].strip():
        raise DataError(f"{name}: {entry!r:.80} is empty: its text is {text[start:end]!r:.20}")
    if said is not None and said != text[start:end]:
        raise DataError(
            f"{name}: its text is {said!r:.60}, but characters {start} to {end} are {text[start:end]!r:.60}; offsets "
            "count characters, not bytes, and end is exclusive"
        )
    return start, end, label


def _or(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


# Words of a text

# Each Han character or kana is a word, since these scripts have no spaces between words.
_ALONE = (
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)

_PIECE = re.compile(rf"[{_ALONE}]|(?P<run>[^\W_{_ALONE}]+)|\S")
_JOINERS = "\u200c\u200d"  # used inside words in Persian and in scripts of India


def split_words(text: str, cuts: Collection[int] = ()) -> list[tuple[int, int]]:
    """The words of a text as (start, end) offsets: runs of letters and digits, and each other character alone.

    A combining mark or a joiner belongs to the character before it, as in a decomposed é and in हिन्दी. A word is
    split at each offset in `cuts` inside of it, so that an entity can begin or end there.
    """
    words: list[tuple[int, int]] = []
    in_run = False
    for match in _PIECE.finditer(text):
        start, end = match.span()
        is_run = match.lastgroup == "run"
        extends = text[start] in _JOINERS or unicodedata.category(text[start])[0] == "M"
        # Two runs touch only if a mark between them was added to the first.
        if words and words[-1][1] == start and (extends or (is_run and in_run)):
            words[-1] = (words[-1][0], end)
        else:
            words.append((start, end))
            in_run = is_run
    if not cuts:
        return words
    edges = ([start, *sorted({c for c in cuts if start < c < end}), end] for start, end in words)
    return [piece for word in edges for piece in pairwise(word)]
