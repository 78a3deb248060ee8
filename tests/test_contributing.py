"""CONTRIBUTING.md's worked example, done as it says in a copy of the checkout: one row, one script, one test."""

import os
import re
import shutil
import subprocess
import sys

import pytest

import forked
from conftest import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    (text,) = re.findall(rf"^```python {name}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return text


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout with the recipe added to it."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in ("src", "recipes", "accelerate_configs"):
        shutil.copytree(ROOT / folder, copy / folder)
    (copy / "tests" / "recipes").mkdir(parents=True)
    for file in ROOT.joinpath("tests").glob("*.py"):
        shutil.copy(file, copy / "tests")
    if (ROOT / "tests" / "forked").is_dir():
        shutil.copytree(ROOT / "tests" / "forked", copy / "tests" / "forked")
    shutil.copy(ROOT / "pyproject.toml", copy)
    table = copy / "src" / "posttrain" / "config" / "recipes.py"
    text = table.read_text(encoding="utf-8")
    assert text.count("\n}  # fmt: skip\n") == 1
    table.write_text(text.replace("\n}  # fmt: skip\n", f"\n{block('row')}}}  # fmt: skip\n"), encoding="utf-8")
    (copy / "recipes" / "kto.py").write_text(block("script"), encoding="utf-8")
    (copy / "tests" / "recipes" / "test_kto.py").write_text(block("test"), encoding="utf-8")
    return copy


def run(checkout, *command):
    environment = {k: v for k, v in os.environ.items() if k != forked.SESSION}  # that server has imported our own src/
    environment["PYTHONPATH"] = str(checkout / "src")
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=280)


def test_the_command_line_knows_it(checkout):
    done = run(checkout, sys.executable, "-m", "posttrain.cli", "keys", "kto")
    assert done.returncode == 0, done.stderr
    assert {"desirable_weight: a number", "adapter.method", "gates.stops"} <= {
        known for line in done.stdout.splitlines() for known in (line, line.partition(":")[0])
    }
    assert "gates.f1" not in done.stdout


def test_its_own_test_passes(checkout):
    done = run(checkout, sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "tests/recipes/test_kto.py")
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
