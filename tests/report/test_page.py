"""The page: valid, self-contained, escaped, and clear about what is missing."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import html5lib
import pytest

from posttrain.cli import main
from posttrain.report.collect import read_facts
from posttrain.report.page import REPORT, render, write_report

from .planted import plant, write_chain

HOSTILE = "<script>alert(1)</script>&\"'</td><img src=x onerror=alert(2)>\x00\x1b]$\\frac{1}{2}$ {{ 7 * 7 }}"
SECRET = "hf_" + "s3cretS3cret" * 2


class Outline(HTMLParser):
    """Collects tags, ids and attributes as a browser does."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.attributes = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]


def check(page):
    """Check that the page parses strictly, has no network access and no scripts, and that ids and references match."""
    html5lib.HTMLParser(strict=True).parse(page)
    outline = Outline(page)
    assert not {"script", "iframe", "object", "embed", "form", "base", "img", "foreignobject"} & set(outline.tags)
    assert len(outline.ids) == len(set(outline.ids))
    for tag, name, value in outline.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("href", "src", "xlink:href"):
            assert value == "data:," or (value[0] == "#" and value[1:] in outline.ids), (tag, value)
        if name in ("aria-labelledby", "clip-path"):
            assert re.sub(r"url\(#|\)", "", value) in outline.ids, (tag, value)
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org)", page)
    return outline


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    return plant(tmp_path_factory.mktemp("begun"), stages=("sft",))


def test_the_page_of_a_complete_chain(tmp_path):
    facts = read_facts(plant(tmp_path))
    page = render(facts)
    outline = check(page)
    assert outline.tags.count("svg") >= 20
    for words in (
        "12 of 40 test rows",
        "Reward against KL",
        "Implicit rewards",
        "kl runaway: 9.5, limit 4. Raise kl_coef.",
    ):
        assert words in " ".join(page.split()), words
    assert "What is missing" not in page
    for stage in facts.stages:
        assert stage.lineage.key in page
        assert stage.lineage.digest in page


@pytest.mark.parametrize("stages", [(), ("sft", "sample")])
def test_the_page_of_an_incomplete_chain(tmp_path, stages):
    chain = plant(tmp_path, stages=stages)
    page = render(read_facts(chain))
    check(page)
    for stage in chain.stages:
        assert (f"{stage.name}: not started" in page) == (stage.name not in stages)


def test_everything_is_escaped(tmp_path):
    stages = ("sft", "sample", "reward", "ppo")
    chain = plant(tmp_path, name="'a <b>bold name & \"more\" $x$'", stages=stages, prompt=lambda p: HOSTILE + p)
    run_dir = chain.run_dir("ppo")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "rewards/<script>alert(3)</script>$y$": 1.0}\n')
    page = render(read_facts(chain))
    check(page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;b&gt;bold" in page
    assert "{{ 7 * 7 }}" in page
    assert "\x00" not in page
    assert "␀␛" in page


def test_the_page_has_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2)
    extra = {
        "sft": f"hub_token: hunter2x\n# {SECRET} https://me:pass9word@host\n",
        "dpo": f"run_name: {'0123456789abcdef' * 2}\n",
    }
    chain = plant(tmp_path, stages=("sft",), extra=extra, prompt=lambda p: f"{p} {SECRET}")
    page = render(read_facts(chain))
    for secret in ("hunter2x", SECRET, "pass9word", "0123456789abcdef0123"):
        assert secret not in page
    assert "[redacted]" in page


def test_the_command_writes_the_page(begun, capsys):
    main(["report", str(begun.path)])
    written = begun.output_dir / REPORT
    assert capsys.readouterr().out.startswith(str(written))
    assert written.read_text().startswith("<!DOCTYPE html>")
    assert written.stat().st_size < 600_000


@pytest.mark.parametrize(
    ("output", "message"), [("nowhere/x.html", "expected a file in a folder that exists"), (".", "expected a file")]
)
def test_an_invalid_output_path_is_refused(begun, tmp_path, output, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(["report", str(begun.path), "--output", str(tmp_path / output)])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_a_page_is_made_without_torch(begun):
    code = (
        "import sys; from posttrain.cli import main; main(['report', sys.argv[1]]); "
        "assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(begun.path)], check=True)


def test_another_chains_directory_is_refused(begun, tmp_path, capsys):
    other = tmp_path / "other.yaml"
    other.write_text(begun.path.read_text().replace("name: planted", "name: another"))
    for stage in begun.stages:
        (tmp_path / stage.config_file.name).write_text(stage.config_file.read_text())
    with pytest.raises(SystemExit) as left:
        main(["report", str(other)])
    assert left.value.code == 2
    assert "belongs to the chain 'planted'" in capsys.readouterr().err


def test_a_chain_that_has_not_run_is_refused(tmp_path, capsys):
    chain = write_chain(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["report", str(chain.path)])
    assert left.value.code == 2
    assert "nothing has run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "none.yaml")])


def test_a_spike_of_one_step_is_drawn(tmp_path):
    """The loss of one step in 20,000 sets the axis: the greatest value is drawn, and in the caption."""
    chain = plant(tmp_path, stages=("sft",), steps=2000)
    path = chain.run_dir("sft") / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:1234], '{"step": 1234, "loss": 87.5}', *lines[1234:]]) + "\n")
    page = render(read_facts(chain))
    assert "greatest 87.5" in page


def test_a_report_is_written_atomically(begun, tmp_path, monkeypatch):
    old = tmp_path / "r.html"
    old.write_text("old")
    monkeypatch.setattr("posttrain.report.page.render", lambda facts: "\ud800")
    with pytest.raises(UnicodeEncodeError):
        write_report(begun, old)
    assert old.read_text() == "old"
