"""A real chain on a tiny model: its view in a terminal, its report, and cards whose code runs."""

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios

import pytest
from huggingface_hub import ModelCard

from conftest import CHAIN_SETTINGS, POLICY_SETTINGS, WORDS, write_jsonl
from posttrain.chain.graph import read_chain
from posttrain.report.collect import read_facts
from posttrain.report.page import render
from posttrain.runs.lineage import read_lineage, verify
from posttrain.runs.paths import CARD
from posttrain.training.merge import merge

from .test_page import check

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_processes")]


def run_in_terminal(command, *, columns=100, rows=30) -> tuple[int, str]:
    """Run a command with a terminal as stdout; return (exit code, its output)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    process = subprocess.Popen(command, stdout=theirs, stdin=theirs, env={**os.environ, "TERM": "xterm-256color"})
    os.close(theirs)
    written = b""
    while select.select([ours], [], [], 300)[0]:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        written += data
    os.close(ours)
    return process.wait(timeout=60), written.decode()


@pytest.fixture(scope="module")
def ran(tiny, tmp_path_factory):
    """(chain, what its terminal saw): SFT and a reward model."""
    folder = tmp_path_factory.mktemp("real")
    write_jsonl(folder / "rows.jsonl", [{"prompt": f"{w[1:]} ->", "completion": f" {w}"} for w in WORDS])
    write_jsonl(
        folder / "pairs.jsonl",
        [{"prompt": f"{w[1:]} ->", "chosen": f" {w}", "rejected": f" {w[::-1]}"} for w in WORDS],
    )
    (folder / "sft.yaml").write_text(
        f"model_name_or_path: {tiny}\ntrain_file: {folder}/rows.jsonl\ntest_file: {folder}/rows.jsonl\n"
        f"test_samples: 2\n{POLICY_SETTINGS}"
    )
    (folder / "reward.yaml").write_text(
        f"train_file: {folder}/pairs.jsonl\nvalidation_file: {folder}/pairs.jsonl\n{CHAIN_SETTINGS}"
    )
    (folder / "chain.yaml").write_text(
        f"name: real\noutput_dir: {folder}/runs\nstages:\n  sft: {{recipe: sft, config: sft.yaml}}\n"
        "  reward: {recipe: reward, config: reward.yaml, inputs: {policy: sft}}\n"
        "launch: {accelerate_config: cpu.yaml}\n"
    )
    code, seen = run_in_terminal([sys.executable, "-m", "posttrain.cli", "run", str(folder / "chain.yaml")])
    assert code == 0, seen
    return read_chain(folder / "chain.yaml"), seen


def test_the_live_view_is_shown_and_all_output_is_logged(ran):
    chain, seen = ran
    assert "\x1b[" in seen
    assert "2 of 2 stages complete" in seen
    assert re.search(r"loss .*[▁▂▃▄▅▆▇█]", seen)
    assert "[1/2 sft]" not in seen  # plain lines go to the file instead
    assert "exact match, greedy" in seen.split("2 of 2 stages complete")[-1]  # the closing table
    kept = (chain.output_dir / ".logs" / "sft.stdout").read_text()
    assert "effective configuration" in kept
    assert len(re.findall(r"^step \d/4", kept, re.MULTILINE)) >= 4
    assert kept.rstrip().splitlines()[-1].startswith("complete: ")

    again = subprocess.run(
        [sys.executable, "-m", "posttrain.cli", "run", str(chain.path)], capture_output=True, text=True, timeout=60
    )
    assert again.stdout.startswith("  skip  sft          complete\n")
    assert "\x1b" not in again.stdout


def test_the_report_of_a_real_chain(ran):
    chain, _ = ran
    facts = read_facts(chain)
    assert [s.state for s in facts.stages] == ["complete", "complete"]
    check(render(facts))
    assert facts.answers.columns == ("base model", "sft")
    assert facts.answers.asked == len(WORDS)
    logged = [json.loads(line) for line in (chain.run_dir("sft") / "metrics.jsonl").read_text().splitlines()]
    losses = [r.get("loss", r.get("train/loss")) for r in logged]
    assert [m for _, _, m, _ in facts.stages[0].log.curves["loss"].points] == [x for x in losses if x is not None]


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_the_code_in_an_adapters_card_runs(ran, tiny, stage):
    chain, _ = ran
    run_dir = chain.run_dir(stage)
    card = ModelCard.load(run_dir / "adapter" / CARD)
    assert card.data.tags == ["posttrain", stage, "trl", "lora"]
    lineage = verify(run_dir)
    assert lineage.digest in card.text
    assert f"adapter/{CARD}" not in lineage.files
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    names: dict = {}
    exec(code.replace("BASE", str(tiny)).replace("THIS_FOLDER", str(run_dir / "adapter")), names)
    probe = lineage.metrics["probe"]
    if stage == "sft":
        from posttrain.training.gates import probe_logprobs

        assert probe_logprobs(names["model"], probe["input_ids"]) == pytest.approx(probe["logprobs"], abs=1e-4)
    else:
        from posttrain.models.scoring import score

        assert score(names["model"], names["tokenizer"], probe["input_ids"]) == pytest.approx(probe["scores"], abs=1e-4)


def test_the_code_in_a_merged_models_card_runs(ran, tmp_path):
    chain, _ = ran
    merge(chain.run_dir("sft"), tmp_path / "plain")
    card = ModelCard.load(tmp_path / "plain" / CARD)
    assert card.data.library_name == "transformers"
    assert read_lineage(chain.run_dir("sft")).digest in card.text
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    names: dict = {}
    exec(code.replace("THIS_FOLDER", str(tmp_path / "plain")), names)
    assert type(names["model"]).__name__ == "LlamaForCausalLM"
