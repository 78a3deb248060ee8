"""Reads YAML files and checks keys and values; messages say where. Imports no torch."""

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from .schema import coerce, describe


def check_keys(mapping: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise ConfigError for a key that is not in `known`, and suggest the nearest one."""
    names = sorted(known)
    for key in mapping:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping. Raises ConfigError that names the file, and the line of a syntax error."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file (looked in {Path.cwd()})") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a folder; a configuration is one YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, got {type(document).__name__}")
    return document


def check_value(key: str, value: Any, type_: Any, limits: Mapping[str, Any], where: str) -> Any:
    """`value` as `type_` and within `limits`, a dataclass field's metadata. Raises ConfigError."""
    try:
        value = coerce(value, type_)
    except ValueError as error:
        raise ConfigError(f"{where}: {key} must be {describe(type_)}, got {value!r}") from error
    if isinstance(value, str) and value.startswith("~/"):
        value = os.path.expanduser(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        accepted = []
        if "above" in limits:
            accepted.append(f"greater than {limits['above']}")
        if "min" in limits:
            accepted.append(f"at least {limits['min']}")
        if "max" in limits:
            accepted.append(f"at most {limits['max']}")
        fits = (
            value == value
            and ("above" not in limits or value > limits["above"])
            and ("min" not in limits or value >= limits["min"])
            and ("max" not in limits or value <= limits["max"])
        )
        if not fits:
            raise ConfigError(f"{where}: {key} must be {' and '.join(accepted)}, got {value!r}")
    return value


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
