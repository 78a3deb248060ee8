"""Files of rows: found by path, and read by type with row numbers."""

import csv
import gzip
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".parquet")


def parse_sources(source: Any, key: str) -> list[tuple[Path, float]]:
    entries = source if isinstance(source, list) else [source]
    parts: list[tuple[Path, float]] = []
    for entry in entries:
        if isinstance(entry, str) and entry:
            parts.append((Path(entry), 1.0))
        elif isinstance(entry, Mapping) and set(entry) <= {"path", "weight"} and isinstance(entry.get("path"), str):
            weight = entry.get("weight", 1.0)
            if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not weight > 0:
                raise DataError(f"{key}: weight of {entry['path']} must be greater than 0, got {weight!r}")
            parts.append((Path(entry["path"]), float(weight)))
        else:
            raise DataError(f"{key}: expected a path or a list of {{path, weight}}, got {entry!r}")
    if not parts:
        raise DataError(f"{key}: the list of files is empty")
    return parts


def list_files(path: Path, key: str) -> list[Path]:
    if not path.exists():
        raise DataError(f"{key}: {path} does not exist (looked in {Path.cwd()}); for a hub dataset use dataset_name")
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES))
        if not files:
            raise DataError(f"{key}: {path} has no file that ends in {', '.join(SUFFIXES)}")
        return files
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{key}: {path}: unknown file type; accepted: {', '.join(SUFFIXES)}")
    return [path]


class BrokenRow(str):
    """Stands in for a row that could not be read; the text says why."""


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1, row) of one file. A row that cannot be read is a `BrokenRow`. Raises DataError."""
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path)
            return
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, row {line}: not UTF-8; convert it with `iconv -f OLD -t UTF-8`") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: damaged gzip file: {error}") from error
    name = path.name.removesuffix(".gz")
    if name.endswith(".csv"):
        yield from _read_csv(path, text)
    elif name.endswith(".jsonl"):
        yield from _read_jsonl(text)
    else:
        yield from _read_json(path, text)


def _read_jsonl(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, BrokenRow(f"broken JSON at column {error.colno}: {error.msg}")


def _read_json(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: broken JSON at column {error.colno}: {error.msg}") from error
    if isinstance(document, dict) and len(document) == 1:
        document = next(iter(document.values()))
    if not isinstance(document, list):
        raise DataError(f"{path}: expected a list of rows, got {type(document).__name__}")
    yield from enumerate(document, 1)


def _read_csv(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if not reader.fieldnames:
        raise DataError(f"{path}: the first line must name the columns")
    for number, row in enumerate(reader, 1):
        if None in row or None in row.values():
            yield number, BrokenRow(f"does not have the {len(reader.fieldnames)} cells that the first line names")
        else:
            yield number, row


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet: {str(error).splitlines()[0]}") from error
    yield from enumerate(table.to_pylist(), 1)
