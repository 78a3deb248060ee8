"""docs/slurm.md shows what `posttrain submit --dry-run` writes for chains of this repository, and lists every key.

`python tests/launch/test_docs.py` brings the page up to date.
"""

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "slurm.md"
HOME = "/home/ada/posttrain"  # where the page's reader has the checkout, and is
BLOCK = re.compile(r"<!-- (\S+) (\S+) -->\n```\w*\n(.*?)```\n", re.DOTALL)


def rendered(chain: str, folder: Path) -> dict[str, str]:
    """What the page shows of a chain: its file, what a dry run prints, and parts of its first stage's script.

    No Slurm is on the path: a machine of this name may have a cluster, or a client that looks for one for a minute.
    """
    path = ROOT / "recipes" / "configs" / chain / "chain.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "posttrain.cli", "submit", str(path), "--dry-run"],
        capture_output=True, text=True, cwd=folder, check=True,
        env={**os.environ, "PATH": str(Path(sys.executable).parent)},
    )  # fmt: skip
    script = _at_home((folder / "runs" / chain / ".slurm" / "sft.sbatch").read_text(), folder)
    return {
        "chain": path.read_text(),
        "graph": _at_home(done.stdout, folder),
        "script": script,
        "head": script.split("# Stage")[0],
        "step": "".join(re.findall(r"  srun .*? &\n|  exec \S+ -m acc.*? rank\n", script, re.DOTALL)),
    }  # fmt: skip


def _at_home(text: str, folder: Path) -> str:
    """The text without what differs between machines: folders, and the key, which depends on library versions."""
    python = Path(sys.executable)
    for here, there in (
        (python, f"{HOME}/.venv/bin/python"), (python.parent, f"{HOME}/.venv/bin"), (ROOT, HOME), (folder, HOME),
    ):  # fmt: skip
        text = text.replace(str(here), there)
    text = re.sub(r"posttrain:[0-9a-f]{12}:", "posttrain:0123456789ab:", text)
    return re.sub(r"  export TORCH_EXTENSIONS_DIR.*\n", "", text)


def pages(folder: Path) -> tuple[str, str]:
    """The page as it is, and as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    chains = {chain: rendered(chain, folder) for chain in dict.fromkeys(m[1] for m in BLOCK.finditer(text))}

    def fill(match: re.Match[str]) -> str:
        start, end = (place - match.start() for place in match.span(3))
        return match[0][:start] + chains[match[1]][match[2]] + match[0][end:]

    return text, BLOCK.sub(fill, text)


def test_the_page_shows_the_generated_scripts(tmp_path):
    is_now, should_be = pages(tmp_path)
    shown = {(m[1], m[2]) for m in BLOCK.finditer(is_now)}
    assert {chain for chain, _ in shown} == {"8b-qlora", "8b-full", "70b-lora"}
    assert ("8b-qlora", "script") in shown
    assert is_now == should_be, "run `python tests/launch/test_docs.py`"


def test_the_page_lists_every_key():
    from posttrain.launch.settings import SlurmSettings

    rows = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [field.name for field in dataclasses.fields(SlurmSettings)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        PAGE.write_text(pages(Path(scratch))[1], encoding="utf-8")
