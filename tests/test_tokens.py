"""What the lengths of rows allow."""

import pytest

from posttrain.data import Rows
from posttrain.errors import DataError
from posttrain.tokens import check_lengths


def test_a_run_without_a_token_to_learn_is_refused(tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = Rows("prompt_completion", [{"prompt": "receive " * 20, "completion": "b"}], ["row 1"])
    with pytest.raises(DataError, match=r"100% of the 1 rows are longer than max_length=8"):
        check_lengths(rows, tokenizer, max_length=8)
    assert check_lengths(rows, tokenizer, max_length=128).too_long == 0
