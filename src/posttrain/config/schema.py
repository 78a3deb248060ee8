"""The fields of a configuration class and their types, read from its source without importing it.

Importing TRL's configuration classes imports torch and transformers: seconds before a typo can be reported, and more
than a login node wants to load. Their fields are plain annotated assignments, so `ast` finds them in milliseconds.

Not read: the checks in `__post_init__` of those classes. They run when the recipe builds the real object.
"""

import ast
import importlib.util
import types
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError

# The names that are understood in an annotation; any other (an enum, a class of the library) is not checked here.
_TYPES: dict[str, Any] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "list": list,
    "dict": dict,
    "tuple": tuple,
    "Any": Any,
    "Literal": Literal,
    "Optional": typing.Optional,
    "Union": typing.Union,
}


class _Names(dict[str, Any]):
    def __missing__(self, key: str) -> Any:
        return Any


@cache
def fields_of(module: str, class_name: str) -> Mapping[str, Any]:
    """The fields of a dataclass in an installed package, base classes included: name -> type.

    `module` is dotted ("trl.trainer.sft_config"). Raises ConfigError when the package or the class is not there.
    """
    tree = ast.parse(_source(module))
    bodies = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if class_name not in bodies:
        raise ConfigError(f"{module} has no class {class_name}: is the installed version within pyproject's range?")
    found: dict[str, Any] = {}
    for base in reversed(bodies[class_name].bases):
        if isinstance(base, ast.Name):
            if base.id in bodies:
                found.update(fields_of(module, base.id))
            elif (origin := _imported_from(tree, base.id, module)) is not None:
                found.update(fields_of(*origin))
    for node in bodies[class_name].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            annotation = ast.unparse(node.annotation)
            if not annotation.startswith("ClassVar") and not node.target.id.startswith("_"):
                found[node.target.id] = _evaluate(annotation)
    return types.MappingProxyType(found)


def _source(module: str) -> str:
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"the package {package!r} is not installed; run `make setup`")
    return Path(spec.submodule_search_locations[0], *rest.split(".")).with_suffix(".py").read_text(encoding="utf-8")


def _imported_from(tree: ast.Module, name: str, module: str) -> tuple[str, str] | None:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
            if node.level:
                parent = module.split(".")[: -node.level]
                return ".".join([*parent, *(node.module or "").split(".")]).rstrip("."), name
            if node.module == "transformers" and name == "TrainingArguments":
                return "transformers.training_args", name
            if node.module and node.module.startswith("trl."):
                return node.module, name
    return None


def _evaluate(annotation: str) -> Any:
    try:
        return eval(annotation.strip("\"'"), {"__builtins__": {}}, _Names(_TYPES))
    except (TypeError, SyntaxError):
        return Any


def coerce(value: Any, type_: Any) -> Any:
    """Return `value` as `type_`, accepting what YAML and a shell can write for it; raise ValueError otherwise.

    YAML reads `1e-3` as text and a shell has only text, so text is read as a number where a number is wanted. A float
    is never truncated to an int, and 0 and 1 are not booleans.
    """
    if type_ is Any:
        return value
    origin = typing.get_origin(type_)
    if origin in (typing.Union, types.UnionType):
        # Narrow types first: "true" is read as a bool rather than a string, and a word is not a list of one.
        members = sorted(typing.get_args(type_), key=_breadth)
        if isinstance(value, str) and "," not in value and str in members:
            members = [m for m in members if (typing.get_origin(m) or m) not in (list, tuple)]
        for member in members:
            try:
                return coerce(value, member)
            except ValueError:
                continue
        raise ValueError(describe(type_))
    if type_ in (None, types.NoneType):
        if value is None or value in ("null", "~"):  # YAML's words; "none" is a value of `report_to`
            return None
        raise ValueError("null")
    if origin is Literal:
        if value in typing.get_args(type_):
            return value
        raise ValueError(describe(type_))
    return _coerce_plain(value, type_, origin)


def _breadth(type_: Any) -> int:
    order = [types.NoneType, bool, int, float, str]
    return order.index(type_) if type_ in order[:4] else 9 if type_ is str else 5


def _coerce_plain(value: Any, type_: Any, origin: Any) -> Any:
    if type_ is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif type_ is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lstrip("+-").isdigit():
            return int(value)
    elif type_ is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError as error:
                raise ValueError("a number") from error
    elif type_ is str:
        if isinstance(value, str):
            return value
    elif (origin or type_) in (list, tuple):
        item = (*typing.get_args(type_), Any)[0]
        if isinstance(value, (list, tuple)):
            return [coerce(v, item) for v in value]
        if isinstance(value, str) and value and item in (str, float, int):
            return [coerce(v.strip(), item) for v in value.split(",")]
    elif (origin or type_) is dict:
        if isinstance(value, dict):
            return value
    else:
        return value
    raise ValueError(describe(type_))


def describe(type_: Any) -> str:
    """What a type accepts, in words for an error message."""
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text", types.NoneType: "null"}
    if type_ in words:
        return words[type_]
    origin = typing.get_origin(type_) or type_
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in typing.get_args(type_))
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in typing.get_args(type_))
    return {list: "a list", tuple: "a list", dict: "a mapping"}.get(origin, str(type_))
