"""Every private part of another library that we use still exists, and is used in `posttrain.upstream` only."""

import ast
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from posttrain import upstream

SRC = Path(upstream.__file__).parents[1]
LIBRARIES = ("trl", "transformers", "peft", "accelerate", "torch", "deepspeed")

# (file, name): private names that may stay outside upstream/.
ALLOWED = {
    ("errors.py", "_exit"): "documented by Python: os._exit",
    ("tracking/trackio_sink.py", "_config_logged"): "trackio is used in this file alone",
    ("tracking/trackio_sink.py", "_next_step"): "trackio is used in this file alone",
    ("report/dashboard.py", "_internal_name"): "wandb_workspaces is used in this file alone",
    ("report/dashboard.py", "_internal_id"): "wandb_workspaces is used in this file alone",
}

OVERRIDDEN = {
    f"{path}.{name}": expected for path, names in upstream.OVERRIDDEN.items() for name, expected in names.items()
}
FUNCTIONS = [*OVERRIDDEN.items(), *upstream.CALLED.items(), *upstream.REPLACED.items()]
# Private names of a library's base class that our subclasses may use.
LISTED = {path.rpartition(".")[2] for path, _ in FUNCTIONS} | {
    n for names in upstream.ATTRIBUTES.values() for n in names
}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


@cache
def find(path):
    pytest.importorskip(path.partition(".")[0])
    return pkgutil.resolve_name(path)


@cache
def source_of(path):
    """The source of a module, or of a class and all that it inherits from."""
    found = find(path)
    if not inspect.isclass(found):
        return inspect.getsource(found)
    written = [c for c in found.__mro__ if c.__module__ not in ("builtins", "typing", "torch._C", "torch._C._fsdp")]
    return "".join(map(inspect.getsource, written))


@cache
def private_names_of(path):
    """The private methods of a class and the private attributes that it gives its objects."""
    return set(re.findall(r"(?:\bdef |\bself\.)(_[a-z]\w*)", source_of(path)))


@pytest.mark.parametrize(("path", "expected"), FUNCTIONS, ids=[path for path, _ in FUNCTIONS])
def test_private_functions_have_the_expected_parameters(path, expected):
    function = find(path)
    if path == "peft.tuners.lora.Linear.forward":  # another test may have put ours in its place
        function = getattr(find("peft.tuners.lora.Linear"), "peft_forward", function)
    assert tuple(inspect.signature(function).parameters) == expected


@pytest.mark.parametrize("path", upstream.ATTRIBUTES)
def test_private_attributes_exist_in_the_source(path):
    assert [n for n in upstream.ATTRIBUTES[path] if not re.search(rf"\b{re.escape(n)}\b", source_of(path))] == []


@pytest.mark.parametrize("path", upstream.LACKING)
def test_upstream_still_lacks_what_we_add(path):
    assert [n for n in upstream.LACKING[path] if re.search(rf"\b{n}\b", source_of(path))] == []


def trees() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(SRC.rglob("*.py")):
        yield file.relative_to(SRC).as_posix(), ast.parse(file.read_text(encoding="utf-8"))


def imported(tree):
    """name -> dotted path, of what a file imports from these libraries."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.partition(".")[0] in LIBRARIES:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.asname or a.name: a.name for a in node.names if a.name.partition(".")[0] in LIBRARIES}
    return found


IMPORTS = sorted({path for _, tree in trees() for path in imported(tree).values() if "." in path})


@pytest.mark.parametrize("path", IMPORTS)
def test_imported_names_exist(path):
    module, _, name = path.rpartition(".")
    if module.startswith("trl.generation"):
        pytest.importorskip("vllm")
    assert find(path) is not None, f"{module} has no {name}"


def own_names(tree):
    """The private names that a file makes: its functions, classes, methods, and attributes of `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            if node.value.id == "self":
                found.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def bases_of(node, names):
    """Dotted paths of a class's bases that come from these libraries."""
    paths = []
    for base in node.bases:
        first, dot, rest = ast.unparse(base).partition("[")[0].partition(".")
        if first in names:
            paths.append(names[first] + dot + rest)
    return paths


def foreign_names(file, tree):
    """(line, name) of what a file uses and should not: a private name, an unexported one of TRL, a replaced one."""
    names, own = imported(tree), own_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            yield from ((node.lineno, part) for part in parts if is_private(part))
            if node.module.startswith("trl."):
                yield node.lineno, node.module
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            of_self = ast.unparse(node.value) in ("self", "cls", "super()")
            listed = node.attr in LISTED
            if of_self and (node.attr in own or listed):
                continue
            if not of_self and node.attr in OUR_NAMES and not listed:
                continue
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) and is_private(str(node.args[1].value)):
                yield node.lineno, node.args[1].value
        elif isinstance(node, ast.Compare) and "vars(" in ast.unparse(node.comparators[0]):
            if isinstance(node.left, ast.Constant) and is_private(str(node.left.value)):
                yield node.lineno, node.left.value
        elif isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in (t for outer in targets for t in (outer.elts if isinstance(outer, ast.Tuple) else [outer])):
                if not isinstance(target, ast.Attribute) or (owner := ast.unparse(target.value)) == "self":
                    continue
                if owner in names or (target.attr not in LISTED and is_method(target.attr)):
                    yield node.lineno, ast.unparse(target)
        elif isinstance(node, ast.ClassDef):
            for path in bases_of(node, names):
                methods = {n.name for n in node.body if isinstance(n, ast.FunctionDef)} - {"__init__"}
                for name in sorted(methods | own):
                    public = path == "transformers.Trainer" and name in methods and is_method(name)
                    if name not in LISTED and (public or name in private_names_of(path)):
                        yield node.lineno, f"{path}.{name}"


OUR_NAMES = {name for _, tree in trees() for name in own_names(tree)}


@cache
def is_method(name):
    owners = [find(path) for path in ("transformers.Trainer", "accelerate.Accelerator", "torch.nn.Module")]
    return any(inspect.isfunction(getattr(owner, name, None)) for owner in owners)


@pytest.mark.parametrize("file", [file for file, _ in trees() if not file.startswith("upstream/")])
def test_private_names_of_others_are_used_only_in_upstream(file):
    tree = ast.parse((SRC / file).read_text(encoding="utf-8"))
    found = [f"line {line}: {name}" for line, name in foreign_names(file, tree) if (file, name) not in ALLOWED]
    assert not found, f"{file} uses these; posttrain/upstream is their place: {found}"


def test_every_exception_is_needed():
    used = {(file, name) for file, tree in trees() for _, name in foreign_names(file, tree)}
    assert ALLOWED.keys() <= used


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from trl.trainer.utils import use_adapter", "trl.trainer.utils"),
        ("from accelerate.commands.launch import _validate_launch_command", "_validate_launch_command"),
        ("import torch\ntorch._dynamo.reset()", "_dynamo"),
        ("trainer._save('folder')", "_save"),
        ("hasattr(layer, '_active_adapter')", "_active_adapter"),
        ("if '_original_forward' in vars(model): pass", "_original_forward"),
        ("from peft.tuners.lora import Linear\nLinear.forward = None", "Linear.forward"),
        ("trainer.get_decay_parameter_names = None", "trainer.get_decay_parameter_names"),
        ("from transformers import Trainer\nclass A(Trainer):\n    def _inner_training_loop(self): pass",
         "transformers.Trainer._inner_training_loop"),
        ("from transformers import Trainer\nclass A(Trainer):\n    def f(self): self._created_lr_scheduler",
         "_created_lr_scheduler"),
    ],
)  # fmt: skip
def test_the_search_finds_private_names(line, name):
    assert name in [found for _, found in foreign_names("file.py", ast.parse(line))]
