"""Secrets are removed from text for others; text that only resembles one is kept."""

import pytest

from posttrain.redact import HIDDEN, clean, is_secret_key, redact, redact_values

SECRETS = (
    "hf_" + "a1B2" * 8, "sk-" + "x9" * 16, "ghp_" + "A" * 36, "github_pat_" + "a" * 30, "AKIA" + "Z" * 16,
    "glpat-" + "b" * 20, "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.abcdefg",
)  # fmt: skip


@pytest.mark.parametrize("secret", SECRETS)
def test_values_that_look_like_secrets_are_redacted(secret):
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
def test_values_after_a_secret_name_are_redacted(line, kept):
    assert "hunter2x" not in redact(line)
    assert redact(line).startswith(kept)


def test_secrets_of_the_environment_are_redacted(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    assert redact("key 0123456789abcdef0123456789abcdef01234567!") == f"key {HIDDEN}!"


def test_values_of_secret_keys_are_redacted():
    assert redact_values({"adapter": {"api_key": "x"}, "hub_token": "y", "seed": 1, "password": None}) == {
        "adapter": {"api_key": HIDDEN}, "hub_token": HIDDEN, "seed": 1, "password": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    "harmless", ["pad_token", "eos_token", "max_new_tokens", "num_virtual_tokens", "tokens_key", "token_column", "key"]
)
def test_harmless_text_is_kept(harmless):
    assert not is_secret_key(harmless)
    line = f"{harmless}: <|im_end|> commit c0ffee{'0' * 34}"
    assert redact(line) == line


def test_characters_that_html_forbids_are_replaced():
    assert clean("a\0b\x1b[0m\ud800\x85\ufffe ok\n") == "a␀b␛[0m\ufffd\ufffd\ufffd ok\n"
