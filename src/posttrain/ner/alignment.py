"""Sentences as token ids: the first sub-word of a word has its tag, and long sentences are split into windows.

A window has as many words as fit between [CLS] and [SEP]. Neighbouring windows share tokens, and each word is tagged in
the window where it is farther from the edge, so that it has context on both sides. A window has the numbers of its
sentence and words, so that predictions are put together again for whole sentences.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


IGNORED = -100  # label of a token without a tag; torch's cross-entropy leaves it out


@dataclass(frozen=True)
class Window:
    """Some words of one sentence as token ids; `places[i]` is the position of the first sub-word of word `words[i]`."""

    sentence: int
    input_ids: list[int]
    words: list[int]
    places: list[int]


@dataclass
class Encoded:
    """The windows of many sentences, and the number of words and sentences that did not fit."""

    windows: list[Window]
    lengths: list[int]  # words of each sentence
    windowed: int = 0  # sentences with more than one window
    cut_sentences: int = 0
    cut_words: int = 0
    invisible_words: int = 0  # words without a sub-word, such as a lone control character: always outside

    def to_dataset(self, tags: Sequence[Sequence[int]]) -> "Dataset":
        """A dataset with the columns `input_ids` and `labels`; `tags[s][w]` is the class of word w of sentence s."""
        from datasets import Dataset

        labels = []
        for window in self.windows:
            row = [IGNORED] * len(window.input_ids)
            for word, place in zip(window.words, window.places, strict=True):
                row[place] = tags[window.sentence][word]
            labels.append(row)
        return Dataset.from_dict({"input_ids": [w.input_ids for w in self.windows], "labels": labels})

    def gather(self, classes: Sequence[Sequence[Any]], outside: Any) -> list[list[Any]]:
        """The values of each sentence's words, from those of its tokens; `outside` for words without a token."""
        found = [[outside] * length for length in self.lengths]
        for window, row in zip(self.windows, classes, strict=True):
            for word, place in zip(window.words, window.places, strict=True):
                found[window.sentence][word] = row[place]
        return found

    def describe(self) -> str:
        """The numbers of sentences, tokens, windows and cut words, in one line."""
        parts = [f"{len(self.lengths)} sentences, {sum(len(w.input_ids) for w in self.windows):,} tokens"]
        if self.windowed:
            parts.append(f"{self.windowed} long sentences in windows")
        if self.cut_sentences:
            parts.append(f"{self.cut_sentences} long sentences cut, {self.cut_words} words left out")
        if self.invisible_words:
            parts.append(f"{self.invisible_words} words without a token")
        return "; ".join(parts)


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer that does not map sub-words to words. Raises ArtifactError."""
    if not tokenizer.is_fast:
        raise ArtifactError(
            f"{type(tokenizer).__name__} does not say which word a token belongs to; use a fast tokenizer"
        )


def encode(
    sentences: Sequence[Sequence[str]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    overlap: int,
    cut: bool = False,
) -> Encoded:
    """Tokenise sentences of words into windows of at most `max_length` ids.

    Raises DataError if `overlap` is as long as a window.
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
    """(start, end, first, last) per window: its tokens, and the range of them whose words it tags."""
    start, first = 0, 0
    while True:
        end = min(start + room, length)
        last = length if end == length else end - overlap // 2
        yield start, end, first, last
        if end == length:
            return
        start, first = end - overlap, last


def _special_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """The special ids that the tokenizer puts before and after a sentence."""
    plain, whole = (
        tokenizer(["a"], is_split_into_words=True, add_special_tokens=s)["input_ids"] for s in (False, True)
    )
    at = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:at], whole[at + len(plain) :]


def logits_of(model: "PreTrainedModel", input_ids: Any, attention_mask: Any) -> Any:
    """Logits (B, T, labels) of right-padded rows (B, T), without those of virtual tokens."""
    out = model(input_ids=input_ids, attention_mask=attention_mask).logits
    return out[:, -input_ids.shape[1] :].float()


def probe_logits(model: "PreTrainedModel", input_ids: Sequence[int]) -> list[float]:
    """The logits of one row of token ids, in eval mode, as a flat list of T x labels numbers."""
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
    """The class of each word and its probability, per sentence; windows are padded on the right."""
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
