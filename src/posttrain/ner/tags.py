"""Tagging schemes. All are converted to BIO (IOB2), which the rest of the package uses.

    bio    B-X begins an entity, I-X goes on (IOB2)
    iob1   I-X begins and goes on; B-X only where an entity follows another of its type (CoNLL-2003 as distributed)
    bioes  also E-X for the last token and S-X for an entity of one token; BILOU writes L-X and U-X for them
    bmes   bioes with M-X in place of I-X (Chinese Resume and Weibo files)
    io     I-X only; adjacent entities of one type cannot be told apart and become one

One rule reads all of them, that of conlleval (Tjong Kim Sang and De Meulder, 2003) and of seqeval's default mode: a
tag begins an entity if it is B or S, or comes after O, E, S or another type. Legal sequences mean the same by this rule
as in their own scheme. Illegal ones are repaired by it, so that a repaired file has the entities that conlleval would
count in it.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Literal

from ..errors import DataError

Scheme = Literal["bio", "iob1", "bioes", "bmes", "io"]
_PREFIXES: dict[Scheme, str] = {"bio": "BI", "iob1": "BI", "bioes": "BIESLU", "bmes": "BMES", "io": "I"}
_SAME = {"L": "E", "U": "S", "M": "I"}


class IllegalTransition(DataError):
    """Tags of the scheme in an illegal order. `to_bio(..., repair=True)` reads them."""


@cache
def _parts(tag: str) -> tuple[str, str]:
    """(prefix, type); ("O", "") for O, ("", "") for text that is not a tag. A type may have dashes and dots."""
    if tag == "O":
        return "O", ""
    if len(tag) > 2 and tag[1] == "-" and tag[0] in "BIESLUM" and tag[2:] == tag[2:].strip():
        return tag[0], tag[2:]
    return "", ""


def is_tag(text: str) -> bool:
    """Whether the text is a tag in any scheme."""
    return _parts(text)[0] != ""


def recognise_scheme(sentences: Sequence[Sequence[str]]) -> Scheme:
    """The scheme whose prefixes a file uses. Raises DataError if no scheme has all of them.

    B- and I- alone may be bio or iob1. It is iob1 only if every B- comes directly after a tag of its own type, which
    is impossible in a legal bio file (its first entity begins with B- after O). So a bio file with a misplaced I- is
    read as bio, with an error. Text that is not a tag is left to `to_bio`, which reports its position.
    """
    used = {_parts(tag)[0] for tag in {tag for tags in sentences for tag in tags}} - {"O", ""}
    if used == {"I"}:
        return "io"
    if used <= {"B", "I"}:
        return "iob1" if "B" in used and _every_b_separates(sentences) else "bio"
    scheme: Scheme = "bmes" if "M" in used else "bioes"
    if not used <= set(_PREFIXES[scheme]):
        raise DataError(
            f"the prefixes {', '.join(sorted(used))} match no scheme; "
            + "; ".join(f"{name} has {', '.join(prefixes)}" for name, prefixes in _PREFIXES.items())
            + ". Fix the tags, or set tag_scheme to one of these."
        )
    return scheme


def _every_b_separates(sentences: Iterable[Sequence[str]]) -> bool:
    for tags in sentences:
        before = ""
        for tag in tags:
            prefix, type_ = _parts(tag)
            if prefix == "B" and type_ != before:
                return False
            before = type_
    return True


def to_bio(tags: Sequence[str], scheme: Scheme, *, repair: bool) -> list[str]:
    """Convert one sentence to BIO. Raises DataError for a tag that the scheme does not have, also with `repair`.

    Tags in an illegal order raise IllegalTransition; with `repair` they are read by conlleval's rule (see above): I-X,
    M-X or E-X with no entity of type X before it begins one, and an entity that is never closed ends with its run.
    """
    allowed = _PREFIXES[scheme]
    result: list[str] = []
    prefix_before, type_before = "O", ""
    for i, tag in enumerate(tags):
        written, type_ = _parts(tag)
        if written != "O" and (not written or written not in allowed):
            raise DataError(
                f"token {i + 1}: {tag!r} is not a tag of scheme {scheme}, "
                f"which has O, {', '.join(f'{letter}-TYPE' for letter in allowed)}"
            )
        prefix = _SAME.get(written, written)
        begins = prefix in "BS" or prefix_before in "OES" or type_ != type_before
        if not repair and not _legal(scheme, prefix_before, prefix, same=type_ == type_before, begins=begins):
            raise IllegalTransition(_complaint(tags, i, scheme))
        result.append("O" if prefix == "O" else f"{'B' if begins else 'I'}-{type_}")
        prefix_before, type_before = prefix, type_
    if not repair and scheme in ("bioes", "bmes") and prefix_before in "BI":
        raise IllegalTransition(_complaint(tags, len(tags), scheme))
    return result


def _legal(scheme: Scheme, before: str, prefix: str, *, same: bool, begins: bool) -> bool:
    """Whether `prefix` may follow `before`, both as BIOES writes them; `same`: their types are equal."""
    if scheme == "bio":
        return prefix != "I" or not begins
    if scheme == "iob1":
        return prefix != "B" or same
    if scheme == "io":
        return True
    return (prefix in "IE" and same) if before in "BI" else prefix not in "IE"


def _complaint(tags: Sequence[str], i: int, scheme: Scheme) -> str:
    """Why tag `i` is illegal there (from 0; one past the last means the end of the sentence)."""
    before = tags[i - 1] if i else "the beginning of the sentence"
    here = tags[i] if i < len(tags) else "the end of the sentence"
    inside = "M" if scheme == "bmes" else "I"
    last, single = ("L", "U") if any(tag[:2] in ("L-", "U-") for tag in tags) else ("E", "S")
    if scheme == "bio":
        expected = f"B-{here[2:]}, since B- begins an entity"
    elif scheme == "iob1":
        expected = f"I-{here[2:]}, since B- only separates an entity from one of the same type before it"
    elif i and before[0] in f"B{inside}":
        expected = f"{inside}-{before[2:]} or {last}-{before[2:]}, since the entity is not closed"
    else:
        expected = f"B-{here[2:]} or {single}-{here[2:]}, since no entity is open"
    return f"token {min(i + 1, len(tags))}: {here} after {before}; {scheme} expects {expected}"


def spans(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """The entities of BIO tags as (first, past the last, type), in order.

    Illegal BIO, which a model may predict, is read by conlleval's rule, as a repaired file is.
    """
    found: list[tuple[int, int, str]] = []
    first, open_type = 0, ""
    for i, tag in enumerate(tags):
        type_ = tag[2:]
        if tag[0] == "I" and type_ == open_type:
            continue
        if open_type:
            found.append((first, i, open_type))
        first, open_type = i, type_
    if open_type:
        found.append((first, len(tags), open_type))
    return found


def from_spans(length: int, entities: Iterable[tuple[int, int, str]]) -> list[str]:
    """BIO tags of `length` tokens with these entities, which must not overlap: the inverse of `spans`."""
    tags = ["O"] * length
    for first, end, type_ in entities:
        tags[first] = f"B-{type_}"
        tags[first + 1 : end] = [f"I-{type_}"] * (end - first - 1)
    return tags
