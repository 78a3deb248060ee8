"""Verifiers, which score a completion without a model: exact match, a regular expression, or your own function.

exact_match          1 when the completion equals the row's own, surrounding white space aside, else 0
regex:PATTERN        1 when PATTERN matches the whole completion, else 0
module:function      function(prompt, completion, row) -> float, imported from the working directory or the path
"""

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..data.conversation import Row, is_exact
from ..errors import ConfigError

Verifier = Callable[[Any, str, Row], float]


def find_verifier(name: str) -> Verifier:
    """The verifier that `name` describes. Raises ConfigError before anything is sampled."""
    if name == "exact_match":
        return _exact_match
    kind, _, rest = name.partition(":")
    if kind == "regex" and rest:
        try:
            pattern = re.compile(rest)
        except re.error as error:
            raise ConfigError(f"verifier: {rest!r} is not a regular expression: {error}") from error
        return lambda prompt, completion, row: float(pattern.fullmatch(completion.strip()) is not None)
    if kind and rest and kind != "regex":
        return _import(kind, rest)
    raise ConfigError(f"verifier must be exact_match, regex:PATTERN or module:function, got {name!r}")


def _exact_match(prompt: Any, completion: str, row: Row) -> float:
    if "completion" not in row:
        raise ConfigError("verifier: exact_match needs rows with a completion to compare with")
    return float(is_exact(completion, row["completion"]))


def _import(module: str, name: str) -> Verifier:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"verifier: cannot import {name!r} from {module!r}: {error} (looked from {here})") from error
    if not callable(function):
        raise ConfigError(f"verifier: {module}:{name} is not a function")

    def checked(prompt: Any, completion: str, row: Row) -> float:
        value = function(prompt, completion, row)
        if not isinstance(value, (int, float)) or value != value:
            raise ConfigError(f"verifier: {module}:{name} returned {value!r}; it must return a number")
        return float(value)

    return checked
