"""Words and sub-words: compared with the tokenizer's own mapping, and checked for any window length."""

import random

import pytest
from transformers import AutoTokenizer

from conftest import SENTENCES
from posttrain.errors import DataError
from posttrain.ner.alignment import IGNORED, encode, predict, probe_logits
from posttrain.training.ner import behind_virtual_tokens

WORDS = [[word for word, _ in sentence] for sentence in SENTENCES]


@pytest.fixture(scope="module")
def tokenizer(tiny_bert):
    return AutoTokenizer.from_pretrained(tiny_bert)


def test_the_first_sub_word_of_a_word_carries_its_class(tokenizer):
    encoded = encode(WORDS, tokenizer, max_length=64, overlap=8)
    tags = [[100 + w for w in range(len(words))] for words in WORDS]
    dataset = encoded.to_dataset(tags)
    for i, words in enumerate(WORDS):
        theirs = tokenizer(words, is_split_into_words=True)
        assert dataset[i]["input_ids"] == theirs["input_ids"]
        before, expected = None, []
        for word in theirs.word_ids():
            expected.append(IGNORED if word is None or word == before else 100 + word)
            before = word
        assert dataset[i]["labels"] == expected
    assert any(len(w.input_ids) > len(w.words) + 2 for w in encoded.windows)  # some word has several


@pytest.mark.parametrize("overlap", [0, 1, 6])
@pytest.mark.parametrize("max_length", [10, 17, 64])
def test_every_word_is_tagged_in_one_window(tokenizer, max_length, overlap):
    rng = random.Random(0)
    texts = [[rng.choice(WORDS[0] + WORDS[2]) for _ in range(n)] for n in (1, 2, 7, 40, 121)]
    encoded = encode(texts, tokenizer, max_length=max_length, overlap=overlap)
    asked = [(w.sentence, word) for w in encoded.windows for word in w.words]
    assert sorted(asked) == [(s, w) for s, words in enumerate(texts) for w in range(len(words))]
    assert max(len(w.input_ids) for w in encoded.windows) <= max_length
    per_sentence = [sum(w.sentence == s for w in encoded.windows) for s in range(len(texts))]
    assert encoded.windowed == sum(n > 1 for n in per_sentence)
    for window in encoded.windows:
        ids = tokenizer(texts[window.sentence], is_split_into_words=True, add_special_tokens=False)
        firsts = {word: ids.word_ids().index(word) for word in window.words}
        assert [window.input_ids[p] for p in window.places] == [ids["input_ids"][firsts[w]] for w in window.words]
        inner = [p for p in window.places if p > 1]
        assert all(p <= len(window.input_ids) - 2 for p in inner)


def test_a_word_is_tagged_in_the_window_where_it_is_farther_from_the_edge(tokenizer):
    words = ["Rome"] * 100
    encoded = encode([words], tokenizer, max_length=22, overlap=8)
    first, second = encoded.windows[:2]
    width = len(tokenizer(["Rome"], is_split_into_words=True, add_special_tokens=False)["input_ids"])
    assert max(first.places) < 1 + 20 - 4 + width
    assert min(second.places) >= 1 + 4


def test_gather_returns_predictions_to_their_words(tokenizer):
    rng = random.Random(1)
    texts = [[rng.choice(WORDS[0]) for _ in range(n)] for n in (5, 60, 3)]
    encoded = encode(texts, tokenizer, max_length=12, overlap=4)
    number = {id(w): i for i, w in enumerate(encoded.windows)}
    rows = [[None] * len(w.input_ids) for w in encoded.windows]
    for window in encoded.windows:
        for word, place in zip(window.words, window.places, strict=True):
            rows[number[id(window)]][place] = (window.sentence, word)
    assert encoded.gather(rows, None) == [[(s, w) for w in range(len(words))] for s, words in enumerate(texts)]


def test_cut_words_are_counted(tokenizer):
    words = ["Rome"] * 30
    encoded = encode([words, ["Oslo"]], tokenizer, max_length=12, overlap=4, cut=True)
    kept = len(encoded.windows[0].words)
    assert (encoded.cut_sentences, encoded.cut_words, len(encoded.windows)) == (1, 30 - kept, 2)
    assert 0 < kept < 30
    assert f"1 long sentences cut, {30 - kept} words left out" in encoded.describe()
    assert encoded.gather([[1] * 12, [1] * 12], 0)[0] == [1] * kept + [0] * (30 - kept)


def test_a_word_without_a_token_stays_outside(tokenizer):
    encoded = encode([["Rome", "\u200b", "Oslo"]], tokenizer, max_length=32, overlap=4)
    assert encoded.invisible_words == 1
    assert encoded.windows[0].words == [0, 2]
    assert encoded.gather([[1] * 32], 0) == [[1, 0, 1]]


def test_an_overlap_as_long_as_a_window_is_refused(tokenizer):
    with pytest.raises(DataError, match="window_overlap is 10: a window of max_length 12 has room for 10 tokens"):
        encode(WORDS, tokenizer, max_length=12, overlap=10)


@pytest.fixture(scope="module")
def model(tiny_bert):
    import torch
    from transformers import AutoModelForTokenClassification

    torch.manual_seed(0)
    return AutoModelForTokenClassification.from_pretrained(tiny_bert, num_labels=5).eval()


def test_padding_changes_no_probability(model, tokenizer):
    """Windows of several lengths in one batch give the probabilities of transformers' forward pass on each alone."""
    import torch

    encoded = encode(WORDS, tokenizer, max_length=64, overlap=8)
    assert len({len(w.input_ids) for w in encoded.windows}) > 1
    classes, sure = predict(model, tokenizer, encoded)
    for window, found, probabilities in zip(encoded.windows, classes, sure, strict=True):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([window.input_ids])).logits[0, window.places].softmax(-1).max(-1)
        assert found == alone.indices.tolist()
        assert probabilities == pytest.approx(alone.values.tolist(), abs=1e-6)


def test_logits_of_virtual_tokens_are_left_out(tiny_bert, tokenizer):
    """Compared with BERT, given the embeddings directly."""
    import torch
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForTokenClassification

    torch.manual_seed(0)
    base = AutoModelForTokenClassification.from_pretrained(tiny_bert, num_labels=5)
    model = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=3, task_type="TOKEN_CLS")).eval()
    ids = tokenizer(WORDS[0], is_split_into_words=True)["input_ids"]
    prompt = model.prompt_encoder["default"].embedding.weight
    rows = torch.cat([prompt, base.get_input_embeddings()(torch.tensor(ids))])[None]
    with torch.no_grad():
        by_hand = model.get_base_model()(inputs_embeds=rows).logits[0, 3:]
    assert probe_logits(model, ids) == pytest.approx(by_hand.flatten().tolist(), abs=1e-5)


def test_the_loss_excludes_virtual_tokens_and_padding():
    from types import SimpleNamespace

    import torch

    torch.manual_seed(0)
    logits, labels = torch.randn(2, 9, 4), torch.tensor([[-100, 1, 2, 0, -100], [-100, 3, -100, -100, -100]])
    own = logits[:, 4:].log_softmax(-1)
    expected = -(own[0, 1, 1] + own[0, 2, 2] + own[0, 3, 0] + own[1, 1, 3])
    out = SimpleNamespace(logits=logits)
    assert behind_virtual_tokens(out, labels).item() == pytest.approx(expected.item() / 4, rel=1e-5)
    assert behind_virtual_tokens(out, labels, num_items_in_batch=8).item() == pytest.approx(
        expected.item() / 8, rel=1e-5
    )
