"""Files of tagged sentences: read, bring to BIO, check each one, fingerprint.

    columns, JSON rows, or a hub id -> sentences with raw tags -> recognise the scheme -> to_bio -> Sentences

As in data.py, an error names file, line or row, and field; the first 20 are shown and the rest counted.

Left out: nested entities (BIO cannot hold them), CSV, folders.
"""

import gzip
import re
import unicodedata
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from ..data import Row, _collected, _string, fingerprint
from ..errors import DataError
from ..files import BrokenRow, read_rows
from ..settings import NerDataSettings
from .tags import IllegalTransition, Scheme, from_spans, is_tag, recognise_scheme, spans, to_bio

_ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_TAGS_KEYS = ("tags", "ner_tags", "labels")
_SPANS_KEYS = ("entities", "spans", "label", "labels")
_TYPE_KEYS = ("label", "type", "entity")


@dataclass
class Sentence:
    """Tokens with a BIO tag each, and where they came from: "dev.conll, line 12" (its first), "x.jsonl, row 3"."""

    tokens: list[str]
    tags: list[str]
    origin: str


@dataclass
class Sentences:
    """Checked sentences, the scheme they were written in, and how many were repaired or left out."""

    sentences: list[Sentence]
    scheme: str
    repaired: int = 0
    skipped: int = 0
    fingerprint: str = field(default="", repr=False)

    def __len__(self) -> int:
        return len(self.sentences)

    def first(self, count: int) -> "Sentences":
        """The first sentences alone, with a fingerprint of their own. Raises DataError when no entity is left."""
        kept = self.sentences[:count]
        if all(tag == "O" for sentence in kept for tag in sentence.tags):
            raise DataError(f"max_train_rows: the first {count} sentences have no entity; raise it")
        return Sentences(kept, self.scheme, self.repaired, self.skipped, _fingerprint(kept))

    def labels(self) -> list[str]:
        """The types of entities, sorted."""
        return sorted({tag[2:] for sentence in self.sentences for tag in sentence.tags if tag != "O"})

    def tag_list(self) -> list[str]:
        """Every tag that these types make, O first: the output classes of a tagger."""
        return ["O", *(f"{prefix}-{label}" for label in self.labels() for prefix in "BI")]


@dataclass
class _Raw:
    """A sentence as its file has it; `problem` says why it cannot be used."""

    origin: str
    tokens: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    problem: str = ""
    is_bio: bool = False  # made from spans: no scheme to recognise, nothing to convert


def load_sentences(source: Any, settings: NerDataSettings, *, key: str) -> Sentences:
    """Load and check the sentences of `train_file`, `validation_file` or `test_file` (the key, for messages).

    `source` is a path or a list of paths, all in one tagging scheme. Raises DataError when a file or a sentence is
    unusable.
    """
    paths = _paths(source, key)
    raw: list[_Raw] = []
    for path in paths:
        raw += _read_row_file(path, settings) if path.name.endswith(_ROW_SUFFIXES) else _read_columns(path, settings)
    return _checked(raw, f"{key}: {', '.join(map(str, paths))}", settings, key=key)


def load_hub_sentences(name: str, config: str | None, split: str, settings: NerDataSettings, *, key: str) -> Sentences:
    """Load and check one split of a hub dataset, its integer tags decoded by the names that it declares.

    `key` is what the split is used as, `train_file` or another. Raises DataError.
    """
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, config, split=split)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"dataset_name: cannot load {name!r} (split {split!r}): {first}. For a file on this machine use train_file."
        ) from error
    columns = [settings.tags_key] if settings.tags_key else _TAGS_KEYS
    names = {column: found for column in columns if (found := _class_names(dataset.features.get(column)))}
    rows = ((f"{name} ({split}), row {i}", _decoded(dict(row), names)) for i, row in enumerate(dataset, 1))
    return _checked([_raw(origin, row, settings) for origin, row in rows], f"{name} ({split})", settings, key=key)


def check_against_train(
    train: Sentences, other: Sentences, *, key: str, on_unseen_tag: Literal["stop", "outside"] = "stop"
) -> int:
    """Refuse types that the training data never has, since a tagger has no output for them. Raises DataError.

    With "outside" their entities become O in `other` instead; returns how many did.
    """
    unseen: dict[str, list[str]] = {label: [] for label in sorted(set(other.labels()) - set(train.labels()))}
    if not unseen:
        return 0
    for sentence in other.sentences:
        entities = spans(sentence.tags)
        for _, _, label in entities:
            if label in unseen:
                unseen[label].append(sentence.origin)
        if on_unseen_tag == "outside":
            kept = [entity for entity in entities if entity[2] not in unseen]
            sentence.tags = from_spans(len(sentence.tags), kept)
    if on_unseen_tag == "stop":
        shown = "; ".join(f"{label} ({len(origins)}, first in {origins[0]})" for label, origins in unseen.items())
        raise DataError(
            f"{key}: entities of a type that train_file never has: {shown}; train_file has "
            f"{', '.join(train.labels())}. Correct the types, add such sentences to train_file, or read them as O with "
            "on_unseen_tag: outside."
        )
    other.fingerprint = _fingerprint(other.sentences)
    return sum(len(origins) for origins in unseen.values())


# Words of a text

# Han characters and kana stand alone, since nothing parts words in their scripts.
_ALONE = (
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_PIECE = re.compile(rf"[{_ALONE}]|(?P<run>[^\W_{_ALONE}]+)|\S")
_JOINERS = "\u200c\u200d"  # stand inside words of Persian and of the scripts of India


def split_words(text: str, cuts: Collection[int] = ()) -> list[tuple[int, int]]:
    """The words of a text as (start, end) offsets: runs of letters and digits, and every other sign alone.

    A combining mark or a joiner belongs to what stands before it, as in a decomposed é and in हिन्दी. At each offset in
    `cuts` that falls inside a word the word is split, so that an entity can begin or end there.
    """
    words: list[tuple[int, int]] = []
    in_run = False
    for match in _PIECE.finditer(text):
        start, end = match.span()
        is_run = match.lastgroup == "run"
        extends = text[start] in _JOINERS or unicodedata.category(text[start])[0] == "M"
        # Two runs touch only where a mark that was taken into the first stands between them.
        if words and words[-1][1] == start and (extends or (is_run and in_run)):
            words[-1] = (words[-1][0], end)
        else:
            words.append((start, end))
            in_run = is_run
    if not cuts:
        return words
    edges = ([start, *sorted({c for c in cuts if start < c < end}), end] for start, end in words)
    return [piece for word in edges for piece in pairwise(word)]


# Columns

_BLANK = " \t\r\f\v"  # ASCII only: U+00A0, U+3000, U+200B and the like occur as tokens


def _read_columns(path: Path, settings: NerDataSettings) -> list[_Raw]:
    # Not str.splitlines: U+2028, U+0085 and form feeds occur inside tokens.
    lines = [line.rstrip("\r") for line in _decode(path, settings.encoding).split("\n")]
    model = next((i for i, line in enumerate(lines) if _is_token_line(line)), None)
    if model is None:
        return []
    tabs = settings.separator == "tab" or (settings.separator == "auto" and "\t" in lines[model])
    width = len(_cells(lines[model], tabs))
    token_at, tag_at = (at + width if at < 0 else at for at in (settings.token_column, settings.tag_column))
    if token_at == tag_at or not (0 <= token_at < width and 0 <= tag_at < width):
        raise DataError(
            f"{path}, line {model + 1}: {lines[model]!r:.60} has {_count(width, 'column')} parted by "
            f"{'tabs' if tabs else 'spaces'}, which cannot hold token_column {settings.token_column} and tag_column "
            f"{settings.tag_column}; set these, or separator"
        )
    found: list[_Raw] = []
    current: _Raw | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip(_BLANK) or line.startswith("-DOCSTART-"):
            current = None
            continue
        cells = _cells(line, tabs)
        if line.startswith("#") and _is_comment(line, cells, width, tag_at):
            continue
        if current is None:
            current = _Raw(f"{path}, line {number}")
            found.append(current)
        if len(cells) != width:
            current.problem = current.problem or (
                f"line {number} has {_count(len(cells), 'column')}, expected {width} as in line {model + 1}: "
                f"{line!r:.60}"
            )
        elif not cells[token_at]:
            current.problem = current.problem or f"line {number} has no token: {line!r:.60}"
        else:
            current.tokens.append(cells[token_at])
            current.tags.append(cells[tag_at])
    if settings.strip_segmentation:
        for sentence in found:
            sentence.tokens = [_without_place(token) for token in sentence.tokens]
    return found


def _decode(path: Path, encoding: str) -> str:
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode(encoding)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: not {encoding} (byte 0x{error.object[error.start]:02x}); set encoding to what the "
            "file is written in, as encoding: latin-1, or convert it with `iconv -f OLD -t UTF-8`"
        ) from error
    except LookupError as error:
        raise DataError(
            f"encoding: Python knows no encoding {encoding!r}; examples: utf-8, latin-1, gb18030"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file: {error}") from error
    if not text:
        raise DataError(f"{path} is empty")
    return text.removeprefix("\ufeff")


def _is_token_line(line: str) -> bool:
    """Whether a line surely holds a token, so that its columns are the file's."""
    return bool(line.strip(_BLANK)) and not line.startswith(("-DOCSTART-", *_COMMENTS))


def _cells(line: str, tabs: bool) -> list[str]:
    if tabs:
        return [cell.strip(" ") or cell for cell in line.split("\t")]  # a space may be a token
    return [cell for cell in line.split(" ") if cell]


_COMMENTS = ("# ", "#begin document", "#end document")  # CoNLL-U's and CoNLL-2012's


def _is_comment(line: str, cells: Sequence[str], width: int, tag_at: int) -> bool:
    """Whether a line is a comment; "#" and "#hashtag" with a tag are tokens, and without one are an error."""
    return line.startswith(_COMMENTS) and not (len(cells) == width and is_tag(cells[tag_at]))


def _without_place(token: str) -> str:
    return token[0] if len(token) == 2 and token[1].isdigit() and not token[0].isdigit() else token


# Rows


def _read_row_file(path: Path, settings: NerDataSettings) -> list[_Raw]:
    return [_raw(f"{path}, row {number}", row, settings) for number, row in read_rows(path)]


def _raw(origin: str, row: Any, settings: NerDataSettings) -> _Raw:
    try:
        if isinstance(row, BrokenRow):
            raise DataError(str(row))
        if not isinstance(row, dict):
            raise DataError(f"expected an object with named fields, got {type(row).__name__}")
        if settings.tokens_key in row and (key := _present(row, settings.tags_key, _TAGS_KEYS, "tags_key")):
            return _Raw(origin, *_tagged_tokens(row, settings.tokens_key, key))
        if settings.text_key in row and (key := _present(row, settings.spans_key, _SPANS_KEYS, "spans_key")):
            return _Raw(origin, *_tagged_text(row, settings.text_key, key), is_bio=True)
        raise DataError(
            f"the fields {sorted(row)} hold neither {settings.tokens_key} with {settings.tags_key or _or(_TAGS_KEYS)}, "
            f"nor {settings.text_key} with {settings.spans_key or _or(_SPANS_KEYS)}; rename them, or set tokens_key "
            "and tags_key, or text_key and spans_key"
        )
    except DataError as error:
        return _Raw(origin, problem=str(error))


def _present(row: Row, chosen: str | None, known: Sequence[str], setting: str) -> str | None:
    """The field to read: the chosen one, or the only known one; None when the row has none of them."""
    found = [name for name in ([chosen] if chosen else known) if name in row]
    if len(found) > 1:
        raise DataError(f"more than one of the fields {', '.join(found)} may be meant; set {setting}")
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
        raise DataError(f"{_count(len(tokens), 'token')}, but {_count(len(tags), 'tag')} in {tags_key}")
    return tokens, tags


def _tagged_text(row: Row, text_key: str, spans_key: str) -> tuple[list[str], list[str]]:
    """The words of a text, with BIO tags that say where its character spans are."""
    text = _string(row[text_key], text_key)
    if not isinstance(row[spans_key], list):
        raise DataError(f"{spans_key}: expected a list of spans, got {row[spans_key]!r:.60}")
    marked = sorted(_span(entry, text, f"{spans_key}[{i}]") for i, entry in enumerate(row[spans_key]))
    for (start, end, label), (next_start, next_end, next_label) in pairwise(marked):
        if next_start < end:
            raise DataError(
                f"{spans_key}: [{next_start}, {next_end}, {next_label!r}] overlaps [{start}, {end}, {label!r}]; "
                "one tag a token cannot hold both: keep one"
            )
    words = split_words(text, {offset for start, end, _ in marked for offset in (start, end)})
    starts, ends = [start for start, _ in words], [end for _, end in words]
    # After the cuts every word is inside a span or outside; a span may begin or end with white space.
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
        raise DataError(f"{name}: {entry!r:.80} is not within the text of {_count(len(text), 'character')}")
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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# Sources


def _paths(source: Any, key: str) -> list[Path]:
    entries = source if isinstance(source, list) else [source]
    if not entries:
        raise DataError(f"{key}: the list of files is empty")
    for entry in entries:
        if not isinstance(entry, (str, Path)) or not str(entry):
            raise DataError(f"{key}: expected a path or a list of paths, got {entry!r}")
        if not Path(entry).exists():
            raise DataError(
                f"{key}: {entry} does not exist (looked in {Path.cwd()}); for a hub dataset use dataset_name"
            )
        if Path(entry).is_dir():
            raise DataError(f"{key}: {entry} is a folder; name the files in it")
    return [Path(entry) for entry in entries]


def _class_names(feature: Any) -> list[str] | None:
    """The names of a list of ClassLabel, None of any other feature."""
    return getattr(getattr(feature, "feature", None), "names", None)


def _decoded(row: Row, names: Mapping[str, Sequence[str]]) -> Row | BrokenRow:
    for column, known in names.items():
        # -1 stands for "not annotated", as in a test split whose tags are withheld.
        unknown = [number for number in row[column] if not 0 <= number < len(known)]
        if unknown:
            return BrokenRow(f"{column}: {unknown[0]} is no tag's number; known: 0 to {len(known) - 1}")
        row[column] = [known[number] for number in row[column]]
    return row


def _checked(raw: Sequence[_Raw], source: str, settings: NerDataSettings, *, key: str) -> Sentences:
    """Bring every usable sentence to BIO; stop, repair or skip the rest as the settings say. Raises DataError."""
    if not raw:
        raise DataError(f"{source} has no sentences")
    scheme: Scheme
    if settings.tag_scheme != "auto":
        scheme = settings.tag_scheme
    else:
        try:
            scheme = recognise_scheme([row.tags for row in raw if not row.problem and not row.is_bio])
        except DataError as error:
            raise DataError(f"{source}: {error}") from error
    good: list[Sentence] = []
    errors: list[str] = []
    skipped: list[str] = []
    hints: set[str] = set()
    repaired = 0
    for row in raw:
        try:
            tags, was_repaired = _bio(row, scheme, settings)
            good.append(Sentence(row.tokens, tags, row.origin))
            repaired += was_repaired
        except IllegalTransition as error:
            errors.append(f"{row.origin}: {error}")
            hints.add(
                "Mend the tags, or read them as conlleval does with on_bad_tags: repair. "
                f"If the scheme is not {scheme}, set tag_scheme."
            )
        except DataError as error:
            if settings.on_bad_row == "stop":
                errors.append(f"{row.origin}: {error}")
                hints.add("Mend them, or drop them with on_bad_row: skip.")
            else:
                skipped.append(f"{row.origin}: {error}")
    if errors:
        raise DataError("\n".join([f"{source}: {_collected(errors, len(raw))}", *sorted(hints)]))
    if not good:
        raise DataError(f"{source}: every sentence is unusable.\n{_collected(skipped, len(raw))}")
    if key == "train_file" and all(tag == "O" for sentence in good for tag in sentence.tags):
        raise DataError(
            f"{source}: no entity in it, only O; are tags read from the right place? See tag_column, tags_key"
        )
    return Sentences(good, scheme, repaired, len(skipped), _fingerprint(good))


def _bio(row: _Raw, scheme: Scheme, settings: NerDataSettings) -> tuple[list[str], bool]:
    """The tags of a row in BIO, and whether they were repaired. Raises DataError."""
    if row.problem:
        raise DataError(row.problem)
    if row.is_bio:
        return row.tags, False
    try:
        return to_bio(row.tags, scheme, repair=False), False
    except IllegalTransition:
        if settings.on_bad_tags == "stop":
            raise
    return to_bio(row.tags, scheme, repair=True), True


def _fingerprint(sentences: Sequence[Sentence]) -> str:
    return fingerprint([{"tokens": sentence.tokens, "tags": sentence.tags} for sentence in sentences])
