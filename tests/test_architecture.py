"""docs/architecture.md is true: its order of imports holds, nothing imports in a circle, and its tree is the tree."""

import ast
import re
import subprocess
import sys
from functools import cache

import pytest

from conftest import ROOT

PACKAGE = ROOT / "src" / "posttrain"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PPO_MAY = {"upstream", "errors", "data", "distributed", "models", "adapters", "ppo"}
BESIDE = 8  # files that may stand beside the wings


def fenced(name: str) -> list[str]:
    """The lines of the one block of the page that is fenced as ```text NAME."""
    (block,) = re.findall(rf"^```text {name}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return block.splitlines()


ORDER = [line.partition(":")[0] for line in fenced("order")]


@cache
def modules() -> dict[str, object]:
    """Dotted name below the package -> its file."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__").removesuffix("__init__")] = path
    return found


def imports_of(name: str) -> set[str]:
    """The modules of ours that a module imports, inside its functions too; not those for type checkers alone."""
    path = modules()[name]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        node for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test) for node in ast.walk(block)
    }  # fmt: skip
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level or node in typing_only:
            continue
        base = [part for part in package[: len(package) - node.level + 1] if part] + (node.module or "").split(".")
        for alias in node.names:
            candidates = (".".join([*filter(None, base), alias.name]), ".".join(filter(None, base)))
            found.add(next(c for c in candidates if c in modules()))
    return found - {name}


def wing(name: str) -> str:
    return name.partition(".")[0]


def test_the_order_has_every_wing():
    assert set(ORDER) == {wing(name) for name in modules()} - {""}
    assert len(modules()) > 100


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_one_way(name):
    for other in imports_of(name) if name else ():
        if wing(other) != wing(name):
            assert ORDER.index(wing(other)) < ORDER.index(wing(name)), f"{name} imports {other}, which comes after it"
        assert wing(name) != "ppo" or wing(other) in PPO_MAY, f"{name} imports {other}: PPOTrainer stands on less"


def test_nothing_imports_in_a_circle():
    left = {name: imports_of(name) for name in modules()}
    while ready := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in ready:
            del left[name]
    assert not left, f"these import each other, or what does: {sorted(left)}"


def test_the_tree_is_the_tree():
    described, path = {}, []
    for line in fenced("tree")[1:]:
        name, _, words = line.strip().partition("  ")
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        path = [*path[:depth], name.rstrip("/")]
        described["/".join(path) + ("/" if name.endswith("/") else "")] = words
        assert words, f"{name} is not described"
    kinds = (".py", ".j2", ".css")
    files = {str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*") if p.suffix in kinds and p.name != "__init__.py"}
    folders = {f"{p.parent.relative_to(PACKAGE)}/" for p in PACKAGE.rglob("__init__.py") if p.parent != PACKAGE}
    assert set(described) == files | folders


def test_few_files_stand_beside_the_wings():
    assert len([p for p in PACKAGE.iterdir() if p.is_file()]) <= BESIDE


def test_no_file_is_long():
    """One that grows is split, or defended: PPOTrainer is one class, its hooks in the order of their calls."""
    long = {str(p.relative_to(PACKAGE)) for p in modules().values() if len(p.read_text().splitlines()) > 400}
    assert long <= {"ppo/trainer.py"}


def test_the_ppo_trainer_alone_loads_few_modules():
    code = "import sys, posttrain.ppo; print(sum(m.split('.')[0] == 'posttrain' for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 10 < int(done.stdout.splitlines()[-1]) <= 25
