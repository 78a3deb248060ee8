"""Tokens per row and per epoch, and the check against max_length."""

import pytest

from posttrain.data.rows import Rows
from posttrain.data.tokens import check_lengths, count_tokens, pair_lengths
from posttrain.errors import DataError


def test_a_run_without_a_token_to_learn_is_refused(tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = Rows("prompt_completion", [{"prompt": "receive " * 20, "completion": "b"}], ["row 1"])
    with pytest.raises(DataError, match=r"100% of the 1 rows are longer than max_length=8"):
        check_lengths(rows, tokenizer, max_length=8)
    assert check_lengths(rows, tokenizer, max_length=128).too_long == 0


def test_count_tokens_sums_all_sequences():
    from datasets import Dataset

    assert count_tokens(Dataset.from_dict({"input_ids": [[1, 2], [3]]})) == 3
    preference = {"prompt_ids": [[1, 2, 3]], "chosen_ids": [[4]], "rejected_ids": [[5, 6]]}
    assert count_tokens(Dataset.from_dict(preference)) == (3 + 1) + (3 + 2)


def test_pair_lengths_are_those_of_the_longer_side():
    from datasets import Dataset

    sides = {"chosen_ids": [[4], [4, 5]], "rejected_ids": [[5, 6, 7], [5]]}
    assert pair_lengths(Dataset.from_dict({"prompt_ids": [[1, 2], [1]], **sides})) == [5, 3]
    assert pair_lengths(Dataset.from_dict(sides)) == [3, 2]
