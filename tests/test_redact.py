"""What must not leave in a log, and what looks like it and may."""

import pytest

from posttrain.redact import HIDDEN, redact, redact_arguments, redact_values


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "a1B2" * 8, "ghp_" + "x" * 36, "sk-proj-" + "z9" * 12, "AKIA" + "ABCD" * 4, "wandb_v1_" + "k" * 40,
        "local-" + "0f" * 20, "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0abc.c2lnbmF0dXJl", "glpat-" + "a" * 20,
    ],
)  # fmt: skip
def test_tokens_by_their_form(secret):
    assert redact(f"before {secret} after") == f"before {HIDDEN} after"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:pass@host/x", f"https://{HIDDEN}@host/x"),
        ("git clone ssh://git:tok@host:22/r.git", f"git clone ssh://{HIDDEN}@host:22/r.git"),
        ("https://h/x?token=abc&a=1", f"https://h/x?token={HIDDEN}&a=1"),
        ("s3://b/k?X-Amz-Signature=abc", f"s3://b/k?X-Amz-Signature={HIDDEN}"),
        ("Authorization: Bearer abcdefghijklmnop123", f"Authorization: {HIDDEN}"),
    ],
)
def test_urls_and_headers(url, shown):
    assert redact(url) == shown


@pytest.mark.parametrize(
    "text",
    ["a" * 40, "https://host/path@2x?step=3", "me@example.org", "eos_token <|im_end|>", "num_tokens=12", "skip-this"],
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


def test_values_of_secret_names_at_any_depth_and_the_rest_as_it_is():
    config = {
        "hub_token": "x", "eos_token": "</s>", "pad_token": None, "num_tokens": 3, "tokenizer": "t",
        "tokenizer_sha256": "a" * 64, "api_key": "k", "nested": [{"db_password": "p", "r": 8}], "token": "t",
        "key": "3f2a", "max_new_tokens": 4, "secret": None, "access_key_id": "id", "skip_prompt": True,
    }  # fmt: skip
    assert redact_values(config) == {
        **config, "hub_token": HIDDEN, "api_key": HIDDEN, "token": HIDDEN, "access_key_id": HIDDEN,
        "nested": [{"db_password": HIDDEN, "r": 8}],
    }  # fmt: skip
    assert config["hub_token"] == "x"


def test_what_the_environment_calls_a_secret_is_one_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("TEAM_PASSWORD", "correct horse")
    monkeypatch.setenv("WANDB_API_KEY", "ab" * 20)
    monkeypatch.setenv("SHORT_TOKEN", "one")
    monkeypatch.setenv("GOOGLE_CREDENTIALS", "/etc/file.json")
    row = {"prompt": "say correct horse, one /etc/file.json", "turns": [{"content": "ab" * 20}]}
    assert redact_values(row) == {
        "prompt": f"say {HIDDEN}, one /etc/file.json", "turns": [{"content": HIDDEN}],
    }  # fmt: skip


def test_a_command_line():
    words = [
        "sft.py",
        "--hub_token",
        "x",
        "--api_key=y",
        "--eos_token",
        "z",
        "--learning_rate",
        "1e-3",
        "https://u:p@h",
    ]
    assert redact_arguments(words) == [
        "sft.py", "--hub_token", HIDDEN, f"--api_key={HIDDEN}", "--eos_token", "z", "--learning_rate", "1e-3",
        f"https://{HIDDEN}@h",
    ]  # fmt: skip
