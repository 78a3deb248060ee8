"""Column files: one token with its tag per line, a blank line after each sentence."""

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

from ..config.sections import NerDataSettings
from ..errors import DataError
from .sentences import RawSentence, counted
from .tags import is_tag

_BLANK = " \t\r\f\v"  # ASCII only: U+00A0, U+3000, U+200B and the like occur as tokens


def read_columns(path: Path, settings: NerDataSettings) -> list[RawSentence]:
    """The sentences of a file; those that cannot be used have a `problem`.

    Raises DataError if the whole file cannot be read: wrong encoding, damaged gzip, or missing columns.
    """
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
            f"{path}, line {model + 1}: {lines[model]!r:.60} has {counted(width, 'column')} separated by "
            f"{'tabs' if tabs else 'spaces'}, which cannot hold token_column {settings.token_column} and tag_column "
            f"{settings.tag_column}; set these, or separator"
        )
    found: list[RawSentence] = []
    current: RawSentence | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip(_BLANK) or line.startswith("-DOCSTART-"):
            current = None
            continue
        cells = _cells(line, tabs)
        if line.startswith("#") and _is_comment(line, cells, width, tag_at):
            continue
        if current is None:
            current = RawSentence(f"{path}, line {number}")
            found.append(current)
        if len(cells) != width:
            current.problem = current.problem or (
                f"line {number} has {counted(len(cells), 'column')}, expected {width} as in line {model + 1}: "
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
            f"{path}, line {line}: not {encoding} (byte 0x{error.object[error.start]:02x}); set encoding to the "
            "file's own, such as encoding: latin-1, or convert it with `iconv -f OLD -t UTF-8`"
        ) from error
    except LookupError as error:
        raise DataError(
            f"encoding: Python does not know the encoding {encoding!r}; examples: utf-8, latin-1, gb18030"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file: {error}") from error
    if not text:
        raise DataError(f"{path} is empty")
    return text.removeprefix("\ufeff")


def _is_token_line(line: str) -> bool:
    """Whether a line certainly has a token, so that its columns are those of the file."""
    return bool(line.strip(_BLANK)) and not line.startswith(("-DOCSTART-", *_COMMENTS))


def _cells(line: str, tabs: bool) -> list[str]:
    if tabs:
        return [cell.strip(" ") or cell for cell in line.split("\t")]  # a space may be a token
    return [cell for cell in line.split(" ") if cell]


_COMMENTS = ("# ", "#begin document", "#end document")  # of CoNLL-U and CoNLL-2012


def _is_comment(line: str, cells: Sequence[str], width: int, tag_at: int) -> bool:
    """Whether a line is a comment. "#" and "#hashtag" are tokens if they have a tag, and an error without one."""
    return line.startswith(_COMMENTS) and not (len(cells) == width and is_tag(cells[tag_at]))


def _without_place(token: str) -> str:
    return token[0] if len(token) == 2 and token[1].isdigit() and not token[0].isdigit() else token
