"""Tagged sentences: as read from a file, and as converted and checked."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..data.rows import fingerprint
from ..errors import DataError


@dataclass
class RawSentence:
    """A sentence as in its file; `problem` says why it cannot be used."""

    origin: str
    tokens: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    problem: str = ""
    is_bio: bool = False  # made from spans: nothing to recognise or convert


@dataclass
class Sentence:
    """Tokens with one BIO tag each, and their origin: "dev.conll, line 12" (the first line), "x.jsonl, row 3"."""

    tokens: list[str]
    tags: list[str]
    origin: str


@dataclass
class Sentences:
    """Checked sentences, the scheme of their source, and the number of those repaired or left out."""

    sentences: list[Sentence]
    scheme: str
    repaired: int = 0
    skipped: int = 0
    fingerprint: str = field(default="", repr=False)

    def __len__(self) -> int:
        return len(self.sentences)

    def first(self, count: int) -> "Sentences":
        """The first `count` sentences, with their own fingerprint. Raises DataError if they have no entity."""
        kept = self.sentences[:count]
        if all(tag == "O" for sentence in kept for tag in sentence.tags):
            raise DataError(f"max_train_rows: the first {count} sentences have no entity; raise it")
        return Sentences(kept, self.scheme, self.repaired, self.skipped, fingerprint_of(kept))

    def labels(self) -> list[str]:
        """The types of entities, sorted."""
        return sorted({tag[2:] for sentence in self.sentences for tag in sentence.tags if tag != "O"})

    def tag_list(self) -> list[str]:
        """All tags of these types, O first: the output classes of a tagger."""
        return ["O", *(f"{prefix}-{label}" for label in self.labels() for prefix in "BI")]


def fingerprint_of(sentences: Sequence[Sentence]) -> str:
    """A hash of tokens and tags, not of their origins."""
    return fingerprint([{"tokens": sentence.tokens, "tags": sentence.tags} for sentence in sentences])


def counted(number: int, noun: str) -> str:
    """1 column, 2 columns."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
