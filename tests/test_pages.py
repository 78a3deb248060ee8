"""What docs/ prints is what the commands beside it print: run again, and compared."""

import importlib.util
import io
import re
from contextlib import redirect_stdout

import pytest

from conftest import ROOT

BLOCK = re.compile(r"^```\n\$ python (benchmarks/\w+\.py) ?(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
TABLES = re.compile(r"^<!-- python (benchmarks/\w+\.py) ?(.*) -->\n((?:.*\n)*?)<!-- end -->$", re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
# Computed with torch: kernels differ from one processor to another, and with them the last digit printed.
MEASURED = {"training", "gradients"}
SLOW = {"gradients", "simulate"}  # half a minute each; the first needs the tagger's demo model


def blocks(page: str, *, count: int):
    """(script, arguments, what the page says it prints) of every block and table of a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = BLOCK.findall(text) + TABLES.findall(text)
    assert len(found) == count, f"{page} has {len(found)}"
    return [pytest.param(*b, marks=[pytest.mark.slow] if b[1] in SLOW else [], id=b[1]) for b in found]


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


@pytest.mark.parametrize(
    ("script", "arguments", "written"), blocks("precision.md", count=5) + blocks("scaling.md", count=4)
)
def test_what_a_page_prints(script, arguments, written):
    printed = output(script, arguments)
    if arguments in MEASURED:
        assert_same(written, printed, within=0.25)
    else:
        assert written == printed
