"""Sentences as token ids: the first sub-word of a word carries its tag, long sentences become windows.

A window is as many words as fit, [CLS] and [SEP] around them. Neighbouring windows share tokens, so that no word is
tagged at an edge; each word is tagged in one window, the one where it stands farther from the edge. Every window knows
its sentence and its words, so that predictions are put together again for whole sentences.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


IGNORED = -100  # a token that carries no tag; torch's cross-entropy leaves it out


@dataclass(frozen=True)
class Window:
    """Some words of one sentence as token ids; `places[i]` is where word `words[i]` has its first sub-word."""

    sentence: int
    input_ids: list[int]
    words: list[int]
    places: list[int]


@dataclass
class Encoded:
    """Windows of many sentences, and what became of words and sentences that do not fit."""

    windows: list[Window]
    lengths: list[int]  # words of each sentence
    windowed: int = 0  # sentences of more than one window
    cut_sentences: int = 0
    cut_words: int = 0
    invisible_words: int = 0  # of no sub-word, such as a lone control character: always outside

    def to_dataset(self, tags: Sequence[Sequence[int]]) -> "Dataset":
        """Columns `input_ids` and `labels`; `tags[s][w]` is the class of word w of sentence s."""
        from datasets import Dataset

        labels = []
        for window in self.windows:
            row = [IGNORED] * len(window.input_ids)
            for word, place in zip(window.words, window.places, strict=True):
                row[place] = tags[window.sentence][word]
            labels.append(row)
        return Dataset.from_dict({"input_ids": [w.input_ids for w in self.windows], "labels": labels})

    def gather(self, classes: Sequence[Sequence[Any]], outside: Any) -> list[list[Any]]:
        """Each sentence's words from each window's tokens; `outside` where a word was cut or has no token."""
        found = [[outside] * length for length in self.lengths]
        for window, row in zip(self.windows, classes, strict=True):
            for word, place in zip(window.words, window.places, strict=True):
                found[window.sentence][word] = row[place]
        return found

    def describe(self) -> str:
        """What a person should know of it, in one line."""
        parts = [f"{len(self.lengths)} sentences, {sum(len(w.input_ids) for w in self.windows):,} tokens"]
        if self.windowed:
            parts.append(f"{self.windowed} long sentences in windows")
        if self.cut_sentences:
            parts.append(f"{self.cut_sentences} long sentences cut, {self.cut_words} words left out")
        if self.invisible_words:
            parts.append(f"{self.invisible_words} words that the tokenizer sees nothing of")
        return "; ".join(parts)


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises ArtifactError for a tokenizer that cannot say which sub-word belongs to which word."""
    if not tokenizer.is_fast:
        raise ArtifactError(f"{type(tokenizer).__name__} does not say which word a token is of; use a fast tokenizer")


def encode(
    sentences: Sequence[Sequence[str]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    overlap: int,
    cut: bool = False,
) -> Encoded:
    """Tokenise sentences of words into windows of at most `max_length` ids.

    Raises DataError when `overlap` leaves a window no room to move on.
    """
    before, after = _special_ids(tokenizer)
    room = max_length - len(before) - len(after)
    if not 0 <= overlap < room:
        raise DataError(f"window_overlap is {overlap}: a window of max_length {max_length} has room for {room} tokens")
    if not sentences:
        return Encoded([], [])
    batch = tokenizer(
        [list(words) for words in sentences], is_split_into_words=True, add_special_tokens=False,
        return_attention_mask=False, return_token_type_ids=False, verbose=False,
    )  # fmt: skip
    encoded = Encoded([], [len(words) for words in sentences])
    for sentence, ids in enumerate(batch["input_ids"]):
        word_of = batch.word_ids(sentence)
        firsts = [i for i, word in enumerate(word_of) if i == 0 or word != word_of[i - 1]]
        encoded.invisible_words += encoded.lengths[sentence] - len(firsts)
        if len(ids) > room and cut:
            encoded.cut_sentences += 1
            encoded.cut_words += sum(1 for i in firsts if i >= room)
            spans = [(0, room, 0, room)]
        else:
            spans = list(_windows(len(ids), room, overlap))
            encoded.windowed += len(spans) > 1
        for start, end, first, last in spans:
            own = [i for i in firsts if first <= i < last]
            encoded.windows.append(
                Window(
                    sentence, [*before, *ids[start:end], *after], [word_of[i] for i in own],
                    [len(before) + i - start for i in own],
                )
            )  # fmt: skip
    return encoded


def _windows(length: int, room: int, overlap: int) -> Iterator[tuple[int, int, int, int]]:
    """(start, end, first, last): a window's tokens, and those among them that it is asked about."""
    start, first = 0, 0
    while True:
        end = min(start + room, length)
        last = length if end == length else end - overlap // 2
        yield start, end, first, last
        if end == length:
            return
        start, first = end - overlap, last


def _special_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a sentence."""
    plain, whole = (
        tokenizer(["a"], is_split_into_words=True, add_special_tokens=s)["input_ids"] for s in (False, True)
    )
    at = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:at], whole[at + len(plain) :]


def logits_of(model: "PreTrainedModel", input_ids: Any, attention_mask: Any) -> Any:
    """Logits (B, T, labels) of right-padded rows (B, T), behind virtual tokens where there are some."""
    out = model(input_ids=input_ids, attention_mask=attention_mask).logits
    return out[:, -input_ids.shape[1] :].float()


def probe_logits(model: "PreTrainedModel", input_ids: Sequence[int]) -> list[float]:
    """The logits of one row of token ids, in eval mode, as one list of T x labels numbers."""
    import torch

    ids = torch.tensor([list(input_ids)], device=model.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = logits_of(model, ids, torch.ones_like(ids))
    model.train(was_training)
    values: list[float] = logits.flatten().tolist()
    return values


def predict(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", encoded: Encoded, *, batch_size: int = 64
) -> tuple[list[Any], list[Any]]:
    """For each sentence, the class of each word and its probability; windows are padded on the right."""
    import torch

    was_training = model.training
    model.eval()
    classes: list[list[int]] = [[] for _ in encoded.windows]
    sure: list[list[float]] = [[] for _ in encoded.windows]
    order = sorted(range(len(encoded.windows)), key=lambda i: len(encoded.windows[i].input_ids))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rows = [encoded.windows[i].input_ids for i in batch]
        width = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        with torch.no_grad():
            best = logits_of(model, ids.to(model.device), mask.to(model.device)).softmax(-1).max(-1)
        for i, found, probability in zip(batch, best.indices.tolist(), best.values.tolist(), strict=True):
            classes[i], sure[i] = found, probability
    model.train(was_training)
    return encoded.gather(classes, 0), encoded.gather(sure, 1.0)
