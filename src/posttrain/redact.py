"""Secrets removed from records, dashboards, reports and cards, and characters that HTML and XML forbid replaced.

A value is a secret if its key's name says so, if it looks like one, or if this process' environment holds it under such
a name. Token ids and special tokens (`pad_token`, `max_new_tokens`) are not secrets. Imports no torch.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "[redacted]"

_NAME = (
    r"(?:[a-z0-9]+[_-])*(?:(?:hub|access|auth|api|hf|session|refresh|write|identity|bearer)[_-]token|api[_-]?key|"
    r"access[_-]key(?:[_-]id)?|secret(?:[_-]key)?|(?:private|account|signing)[_-]key|password|passwd|credentials?|"
    r"authorization)"
)

_KEY = re.compile(rf"^(?:{_NAME}|token)$", re.IGNORECASE)

_ASSIGNED = re.compile(
    rf"(?i)(?<![\w-])({_NAME}[\"']?\s*[:=]\s*|--{_NAME}[ =])(?!null\b|none\b)"
    r"(\"[^\"]*\"|'[^']*'|(?:(?:bearer|basic)\s+)?\S+)"
)

_LOOKS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|"
    r"glpat-[\w-]{16,}|(?:AKIA|ASIA)[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,}|"
    r"AIza[\w-]{35}|wandb_v\d_\w{20,}|local-[0-9a-f]{40})"  # W&B's older keys look like a git commit
    r"|(?<=://)[^\s/@]+(?=@)|(?<=\bBearer )[\w.~+/=-]{8,}"
)

_PARAMETER = re.compile(r"(?i)([?&](?:[\w-]*token|key|sig|[\w-]*signature)=)[^&\s\"']+")
_ENVIRONMENT = re.compile(r"(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIALS?)(?:_ID)?$", re.IGNORECASE)


def is_secret_key(key: str) -> bool:
    """Whether a configuration key names a secret; only the last part of a dotted key counts."""
    return _KEY.match(key.rpartition(".")[2]) is not None


def redact(text: str) -> str:
    """`text` without what looks like a secret, and without the secrets of this process' environment."""
    for value in _environment_secrets():
        text = text.replace(value, HIDDEN)
    for named in (_ASSIGNED, _PARAMETER):
        text = named.sub(rf"\g<1>{HIDDEN}", text)
    return _LOOKS.sub(HIDDEN, text)


def redact_values(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping without the values of secret keys, and without secrets in its texts, nested ones included."""
    return {
        key: HIDDEN if value not in (None, "", False) and is_secret_key(str(key)) else _redact_any(value)
        for key, value in mapping.items()
    }


def _redact_any(value: Any) -> Any:
    if isinstance(value, Mapping):
        return redact_values(value)
    if isinstance(value, (list, tuple)):
        return [_redact_any(v) for v in value]
    return redact(value) if isinstance(value, str) else value


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line without secrets: `--hub_token X` and `--hub_token=X` by name, and `redact` on each word."""
    redacted, hide = [], False
    for word in arguments:
        name, equals, _ = word.partition("=")
        secret = word.startswith("--") and is_secret_key(name[2:])
        if hide and not word.startswith("--"):
            redacted.append(HIDDEN)
        else:
            redacted.append(f"{name}={HIDDEN}" if secret and equals else redact(word))
        hide = secret and not equals
    return redacted


_CONTROLS = {n: 0x2400 + n for n in range(32) if n not in (9, 10)} | {0x7F: 0x2421}


_CONTROLS |= {n: 0xFFFD for n in (*range(0x80, 0xA0), *range(0xD800, 0xE000), *range(0xFDD0, 0xFDF0))}


_CONTROLS |= {plane * 0x10000 + end: 0xFFFD for plane in range(17) for end in (0xFFFE, 0xFFFF)}


def clean(text: str) -> str:
    """`text` without secrets; control characters and lone surrogates, which HTML and XML forbid, are replaced."""
    return redact(text).translate(_CONTROLS)


def _environment_secrets() -> list[str]:
    """Longest first, so that no part of a longer one is left. Short values are skipped: they may be ordinary words."""
    found = {
        value
        for name, value in os.environ.items()
        if _ENVIRONMENT.search(name) and len(value) >= 8 and not value.startswith(("/", "~"))
    }  # a path to a secret is not a secret
    return sorted(found, key=len, reverse=True)
