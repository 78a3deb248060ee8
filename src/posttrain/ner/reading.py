"""Tagged sentences from files and the hub: read, converted to BIO, checked and fingerprinted.

    columns (columns.py), rows (rows.py), or a hub id -> raw sentences -> recognise the scheme -> to_bio -> Sentences

As in `data/rows.py`, an error names file, line or row, and field; the first 20 are shown, the others counted.

Not supported: nested entities (BIO cannot hold them), CSV, folders.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..config.sections import NerDataSettings
from ..data.conversation import Row
from ..data.files import BrokenRow
from ..data.rows import summarise_errors
from ..errors import DataError
from .columns import read_columns
from .rows import ROW_SUFFIXES, TAGS_KEYS, read_row, read_row_file
from .sentences import RawSentence, Sentence, Sentences, fingerprint_of
from .tags import IllegalTransition, Scheme, from_spans, recognise_scheme, spans, to_bio


def load_sentences(source: Any, settings: NerDataSettings, *, key: str) -> Sentences:
    """Load and check the sentences of `train_file`, `validation_file` or `test_file` (the key, for messages).

    `source` is a path or a list of paths, all in one tagging scheme. Raises DataError for a file or a sentence
    that cannot be used.
    """
    paths = _paths(source, key)
    raw: list[RawSentence] = []
    for path in paths:
        raw += read_row_file(path, settings) if path.name.endswith(ROW_SUFFIXES) else read_columns(path, settings)
    return _checked(raw, f"{key}: {', '.join(map(str, paths))}", settings, key=key)


def load_hub_sentences(name: str, config: str | None, split: str, settings: NerDataSettings, *, key: str) -> Sentences:
    """Load and check one split of a hub dataset; integer tags are decoded by the names that it declares.

    `key` is the use of the split, such as `train_file`. Raises DataError.
    """
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, config, split=split)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"dataset_name: cannot load {name!r} (split {split!r}): {first}. For a file on this machine use train_file."
        ) from error
    columns = [settings.tags_key] if settings.tags_key else TAGS_KEYS
    names = {column: found for column in columns if (found := _class_names(dataset.features.get(column)))}
    rows = ((f"{name} ({split}), row {i}", _decoded(dict(row), names)) for i, row in enumerate(dataset, 1))
    return _checked([read_row(origin, row, settings) for origin, row in rows], f"{name} ({split})", settings, key=key)


def check_against_train(
    train: Sentences, other: Sentences, *, key: str, on_unseen_tag: Literal["stop", "outside"] = "stop"
) -> int:
    """Refuse types that are not in the training data, since the tagger has no output for them. Raises DataError.

    With "outside" their entities become O in `other` instead; returns their number.
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
            f"{key}: entities of types that are not in train_file: {shown}; train_file has "
            f"{', '.join(train.labels())}. Correct the types, add such sentences to train_file, or read them as O with "
            "on_unseen_tag: outside."
        )
    other.fingerprint = fingerprint_of(other.sentences)
    return sum(len(origins) for origins in unseen.values())


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
    """The names of a list of ClassLabel; None for any other feature."""
    return getattr(getattr(feature, "feature", None), "names", None)


def _decoded(row: Row, names: Mapping[str, Sequence[str]]) -> Row | BrokenRow:
    for column, known in names.items():
        # -1 stands for "not annotated", as in a test split whose tags are withheld.
        unknown = [number for number in row[column] if not 0 <= number < len(known)]
        if unknown:
            return BrokenRow(f"{column}: {unknown[0]} is not a tag's number; known: 0 to {len(known) - 1}")
        row[column] = [known[number] for number in row[column]]
    return row


def _checked(raw: Sequence[RawSentence], source: str, settings: NerDataSettings, *, key: str) -> Sentences:
    """Convert every usable sentence to BIO; refuse, repair or skip the others, by the settings. Raises DataError."""
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
                "Fix the tags, or read them as conlleval does with on_bad_tags: repair. "
                f"If the scheme is not {scheme}, set tag_scheme."
            )
        except DataError as error:
            if settings.on_bad_row == "stop":
                errors.append(f"{row.origin}: {error}")
                hints.add("Fix them, or drop them with on_bad_row: skip.")
            else:
                skipped.append(f"{row.origin}: {error}")
    if errors:
        raise DataError("\n".join([f"{source}: {summarise_errors(errors, len(raw))}", *sorted(hints)]))
    if not good:
        raise DataError(f"{source}: every sentence is unusable.\n{summarise_errors(skipped, len(raw))}")
    if key == "train_file" and all(tag == "O" for sentence in good for tag in sentence.tags):
        raise DataError(
            f"{source}: no entity in it, only O; are tags read from the right place? See tag_column, tags_key"
        )
    return Sentences(good, scheme, repaired, len(skipped), fingerprint_of(good))


def _bio(row: RawSentence, scheme: Scheme, settings: NerDataSettings) -> tuple[list[str], bool]:
    """The tags of a sentence in BIO, and whether they were repaired. Raises DataError."""
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
