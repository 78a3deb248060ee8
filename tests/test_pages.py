"""What docs/ prints is what the commands beside it print: run again, and compared."""

import importlib.util
import io
import re
from contextlib import redirect_stdout

import pytest

from conftest import ROOT

BLOCK = re.compile(r"^```\n\$ python (benchmarks/\w+\.py) ?(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
# Computed with torch: kernels differ from one processor to another, and with them the last digit printed.
MEASURED = {"training", "gradients"}
NEEDS_THE_DEMO_MODEL = {"gradients"}


def blocks(page: str) -> list[tuple[str, str, str]]:
    """(script, arguments, text) of every block of a page."""
    return BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))


def output(script: str, arguments: str) -> str:
    spec = importlib.util.spec_from_file_location(script.replace("/", "_"), ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with redirect_stdout(io.StringIO()) as printed:
        module.main(arguments.split())
    return printed.getvalue()


def assert_same(written: str, printed: str, *, within: float) -> None:
    """The same words, and numbers within a share of each other."""
    assert NUMBER.sub("#", written).split() == NUMBER.sub("#", printed).split()
    pairs = zip(NUMBER.findall(written), NUMBER.findall(printed), strict=True)
    for was, now in ((float(w.replace(",", "")), float(n.replace(",", ""))) for w, n in pairs):
        assert now == pytest.approx(was, rel=within, abs=1e-12), (was, now)


def cells(page: str, count: int):
    found = blocks(page)
    assert len(found) == count, f"{page} has {len(found)} blocks"
    return [
        pytest.param(
            *block, marks=[pytest.mark.slow] if block[1] in NEEDS_THE_DEMO_MODEL else [], id=block[1] or block[0]
        )
        for block in found
    ]  # fmt: skip


@pytest.mark.parametrize(("script", "arguments", "written"), cells("precision.md", 5))
def test_precision(script, arguments, written):
    printed = output(script, arguments)
    if arguments in MEASURED:
        assert_same(written, printed, within=0.25)
    else:
        assert written == printed
