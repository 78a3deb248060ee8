"""Rows: the format is recognised, and each row is converted to TRL's columns, checked and fingerprinted.

    files.read_rows, or a hub id -> recognise -> normalise -> check -> Rows -> (with a tokenizer) tokens.check_lengths

All of it is plain Python, so that a broken row is reported before a model is loaded. An error names file, row and
field; the first 20 errors are shown, the others counted.

Not supported: streaming (rows could not be checked beforehand) and images.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.recipes import RECIPES
from ..config.sections import DataSettings
from ..errors import DataError
from .conversation import Row, _conversation, _same_kind, _turn, require_text
from .files import BrokenRow, list_files, parse_sources, read_rows

if TYPE_CHECKING:
    from datasets import Dataset


MAX_SHOWN = 20

# The columns of each format, most specific first: a preference row may also have a prompt.
_SIGNATURES: tuple[tuple[str, frozenset[str]], ...] = (
    ("preference", frozenset({"chosen", "rejected"})),
    ("unpaired", frozenset({"prompt", "completion", "label"})),
    ("prompt_completion", frozenset({"prompt", "completion"})),
    ("alpaca", frozenset({"instruction", "output"})),
    ("messages", frozenset({"messages"})),
    ("sharegpt", frozenset({"conversations"})),
    ("text", frozenset({"text"})),
    ("prompt", frozenset({"prompt"})),
)

FORMATS = tuple(name for name, _ in _SIGNATURES)

_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass
class Rows:
    """Checked rows in TRL's columns, each with its origin."""

    format: str
    rows: list[Row]
    origins: list[str]  # "file.jsonl, row 3", parallel to rows
    skipped: int = 0
    fingerprint: str = field(default="", repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def to_dataset(self) -> "Dataset":
        from datasets import Dataset

        return Dataset.from_list(self.rows)


def load_rows(source: Any, recipe: str, settings: DataSettings, *, key: str, seed: int = 42) -> Rows:
    """Load and check the rows of `train_file`, `validation_file` or `test_file` (the key, for messages).

    `source` is a path, or a list of `{path, weight}`. Raises DataError for a file or a row that cannot be used.
    """
    parts = parse_sources(source, key)
    loaded = [_load_one(path, recipe, settings, key) for path, _ in parts]
    if len({part.format for part in loaded}) > 1:
        found = ", ".join(f"{path} is {part.format}" for (path, _), part in zip(parts, loaded, strict=True))
        raise DataError(f"{key}: a mixture needs one format, but {found}; convert one, or set data_format")
    mixed = loaded[0] if len(loaded) == 1 else _mix(loaded, [w for _, w in parts], seed)
    limit = settings.max_train_rows
    if key == "train_file" and limit is not None and limit < len(mixed):
        mixed.rows, mixed.origins = mixed.rows[:limit], mixed.origins[:limit]
    mixed.fingerprint = fingerprint(mixed.rows)
    return mixed


def load_hub(settings: DataSettings, recipe: str, *, split: str) -> Rows:
    """Load and check one split of a hub dataset. Raises DataError."""
    from datasets import load_dataset

    try:
        dataset = load_dataset(settings.dataset_name, settings.dataset_config, split=split)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"dataset_name: cannot load {settings.dataset_name!r} (split {split!r}): {first}. "
            "For a file on this machine use train_file."
        ) from error
    name = str(settings.dataset_name)
    rows = _check_all([(f"{name}, row {i}", dict(r)) for i, r in enumerate(dataset, 1)], name, recipe, settings)
    rows.fingerprint = fingerprint(rows.rows)
    return rows


def fingerprint(rows: Sequence[Row]) -> str:
    """SHA-256 of the rows in their order, in hexadecimal."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
        digest.update(b"\n")
    return digest.hexdigest()


# Sources


def _mix(parts: Sequence[Rows], weights: Sequence[float], seed: int) -> Rows:
    """Draw without replacement in the shares of `weights`, until one source has no more rows."""
    total = min(len(p) / (w / sum(weights)) for p, w in zip(parts, weights, strict=True))
    rng = random.Random(seed)
    drawn: list[tuple[Row, str]] = []
    for part, weight in zip(parts, weights, strict=True):
        count = min(len(part), round(total * weight / sum(weights)))
        picks = sorted(rng.sample(range(len(part)), count))
        drawn += [(part.rows[i], part.origins[i]) for i in picks]
    rng.shuffle(drawn)
    return Rows(parts[0].format, [r for r, _ in drawn], [o for _, o in drawn], sum(p.skipped for p in parts))


def _load_one(path: Path, recipe: str, settings: DataSettings, key: str) -> Rows:
    files = list_files(path, key)
    numbered: list[tuple[str, Any]] = []
    for file in files:
        numbered += [(f"{file}, row {number}", row) for number, row in read_rows(file)]
    if not numbered:
        raise DataError(f"{key}: {path} has no rows")
    return _check_all(numbered, str(path), recipe, settings)


# Formats


def recognise(columns: Sequence[str]) -> str | None:
    """The format of rows with these columns, or None."""
    return next((name for name, needed in _SIGNATURES if needed <= set(columns)), None)


def _check_all(numbered: Sequence[tuple[str, Any]], source: str, recipe: str, settings: DataSettings) -> Rows:
    format_ = settings.data_format
    if format_ == "auto":
        first = next((row for _, row in numbered if isinstance(row, dict)), None)
        if first is None:
            errors = [
                f"{origin}: {row if isinstance(row, BrokenRow) else 'expected an object'}" for origin, row in numbered
            ]
            raise DataError(summarise_errors(errors, len(numbered)))
        found = recognise(list(first))
        if found is None:
            raise DataError(
                f"{source}: columns {sorted(first)} match no known format; known: "
                + "; ".join(f"{name} ({', '.join(sorted(cols))})" for name, cols in _SIGNATURES)
                + ". Rename the columns, or set data_format."
            )
        format_ = found  # type: ignore[assignment]
    target = {"alpaca": "prompt_completion", "sharegpt": "messages"}.get(format_, format_)
    if target not in RECIPES[recipe].formats:
        raise DataError(
            f"{source}: {format_} rows cannot train {recipe}, which takes {' or '.join(RECIPES[recipe].formats)}"
        )
    needed = dict(_SIGNATURES)[format_]
    good, origins, errors = [], [], []
    for origin, row in numbered:
        try:
            good.append(_normalise(row, format_, needed))
            origins.append(origin)
        except DataError as error:
            errors.append(f"{origin}: {error}")
    if errors and settings.on_bad_row == "stop":
        raise DataError(summarise_errors(errors, len(numbered)) + "\nFix them, or drop them with on_bad_row: skip.")
    if not good:
        raise DataError(f"{source}: every row is unusable.\n{summarise_errors(errors, len(numbered))}")
    return Rows(target, good, origins, skipped=len(errors))


def summarise_errors(errors: Sequence[str], total: int) -> str:
    """The number of rows that cannot be used, the first `MAX_SHOWN` errors, and the number of others."""
    shown = "\n".join(f"  {e}" for e in errors[:MAX_SHOWN])
    more = f"\n  ... and {len(errors) - MAX_SHOWN} more" if len(errors) > MAX_SHOWN else ""
    return f"{len(errors)} of {total} rows cannot be used:\n{shown}{more}"


def _normalise(row: Any, format_: str, needed: frozenset[str]) -> Row:
    """Convert one row to TRL's columns. Raises DataError with the field and what is wrong with it."""
    if isinstance(row, BrokenRow):
        raise DataError(str(row))
    if not isinstance(row, dict):
        raise DataError(f"expected an object with named fields, got {type(row).__name__}")
    missing = sorted(needed - set(row))
    if missing:
        raise DataError(f"field {missing[0]!r} is missing; the row has {sorted(row)}")
    return _NORMALISERS[format_](row)


def _text(row: Row) -> Row:
    return {"text": require_text(row["text"], "text")}


def _messages(row: Row) -> Row:
    return {"messages": _conversation(row["messages"], "messages", ends="assistant")}


def _sharegpt(row: Row) -> Row:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise DataError(f"conversations: expected a list of turns, got {type(turns).__name__}")
    messages = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
            raise DataError(f"conversations[{i}]: expected {{from, value}}, got {turn!r:.80}")
        if turn["from"] not in _SHAREGPT_ROLES:
            raise DataError(
                f"conversations[{i}].from: unknown role {turn['from']!r}; known: {', '.join(_SHAREGPT_ROLES)}"
            )
        messages.append({"role": _SHAREGPT_ROLES[turn["from"]], "content": turn["value"]})
    return {"messages": _conversation(messages, "conversations", ends="assistant")}


def _alpaca(row: Row) -> Row:
    instruction = require_text(row["instruction"], "instruction")
    context = row.get("input") or ""
    if context:
        instruction = f"{instruction}\n\n{require_text(context, 'input')}"
    return {
        "prompt": [{"role": "user", "content": instruction}],
        "completion": [{"role": "assistant", "content": require_text(row["output"], "output")}],
    }


def _prompt_completion(row: Row) -> Row:
    return {
        "prompt": _turn(row["prompt"], "prompt", ends="user"),
        "completion": _same_kind(row, "completion", row["prompt"]),
    }


def _prompt(row: Row) -> Row:
    return {"prompt": _turn(row["prompt"], "prompt", ends="user")}


def _unpaired(row: Row) -> Row:
    if not isinstance(row["label"], bool):
        raise DataError(f"label: expected true or false, got {row['label']!r}")
    return {**_prompt_completion(row), "label": row["label"]}


def _preference(row: Row) -> Row:
    """Take an explicit prompt, or the turns that chosen and rejected have in common (TRL's `extract_prompt`)."""
    if "prompt" in row:
        result = {
            "prompt": _turn(row["prompt"], "prompt", ends="user"),
            "chosen": _same_kind(row, "chosen", row["prompt"]),
            "rejected": _same_kind(row, "rejected", row["prompt"]),
        }
    else:
        result = {name: _turn(row[name], name, ends="assistant") for name in ("chosen", "rejected")}
    if result["chosen"] == result["rejected"]:
        raise DataError("chosen and rejected are the same")
    return result


_NORMALISERS: dict[str, Callable[[Row], Row]] = {
    "text": _text,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "prompt": _prompt,
    "unpaired": _unpaired,
    "preference": _preference,
}
