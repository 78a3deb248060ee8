"""What is written for others has no secret, and keeps what only looks like one."""

import pytest

from posttrain.redact import HIDDEN, clean, is_secret_key, redact, redact_values

SECRETS = (
    "hf_" + "a1B2" * 8, "sk-" + "x9" * 16, "ghp_" + "A" * 36, "github_pat_" + "a" * 30, "AKIA" + "Z" * 16,
    "glpat-" + "b" * 20, "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.abcdefg",
)  # fmt: skip


@pytest.mark.parametrize("secret", SECRETS)
def test_by_its_look(secret):
    assert redact(f"see {secret}, there") == f"see {HIDDEN}, there"


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("hub_token: hunter2x", "hub_token: "),
        ("--hub_token hunter2x --lr 1", "--hub_token "),
        ("WANDB_API_KEY=hunter2x", "WANDB_API_KEY="),
        ('{"password": "hunter2x"}', '{"password": '),
        ("https://me:hunter2x@host/x", "https://"),
        ("Authorization: Bearer hunter2xhunter2x", "Authorization: "),
    ],
)
def test_by_where_it_stands(line, kept):
    assert "hunter2x" not in redact(line)
    assert redact(line).startswith(kept)


def test_by_the_environment(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    assert redact("key 0123456789abcdef0123456789abcdef01234567!") == f"key {HIDDEN}!"


def test_by_the_name_of_a_key():
    assert redact_values({"adapter": {"api_key": "x"}, "hub_token": "y", "seed": 1, "password": None}) == {
        "adapter": {"api_key": HIDDEN}, "hub_token": HIDDEN, "seed": 1, "password": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    "harmless", ["pad_token", "eos_token", "max_new_tokens", "num_virtual_tokens", "tokens_key", "token_column", "key"]
)
def test_what_is_no_secret(harmless):
    assert not is_secret_key(harmless)
    line = f"{harmless}: <|im_end|> commit c0ffee{'0' * 34}"
    assert redact(line) == line


def test_signs_that_a_page_cannot_hold():
    assert clean("a\0b\x1b[0m\ud800\x85\ufffe ok\n") == "a␀b␛[0m\ufffd\ufffd\ufffd ok\n"
