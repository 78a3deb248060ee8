"""`make demo-ner`, on the real model: names that training never saw are found."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_demo_finds_names_it_has_never_seen(tmp_path):
    command = [sys.executable, "-m", "posttrain.cli", "demo", "--ner"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    run = tmp_path / "runs" / "minilm-names" / "ner"
    lineage = json.loads((run / "lineage.json").read_text())
    assert lineage["metrics"]["f1"] >= 0.9
    assert lineage["cost"]["trained_parameters"] / lineage["cost"]["parameters"] < 0.03
    text = "Margaret Hale of Thornton Mills came to Milton ."
    tagged = subprocess.run(
        [sys.executable, "-m", "posttrain.cli", "tag", str(run), text, "--json"], capture_output=True, text=True
    )
    entities = json.loads(tagged.stdout)["entities"]
    assert "Margaret Hale" in [e["text"] for e in entities if e["type"] == "PER"]
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "skip  ner" in again.stdout
