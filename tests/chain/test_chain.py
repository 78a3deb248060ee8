"""What a chain runs: complete stages are skipped, interrupted ones resumed, those that depend on a change run again."""

import json
import re
import subprocess

import pytest

from conftest import PYTHON, ROOT, actions, edit
from posttrain.chain.graph import read_chain
from posttrain.chain.plan import plan
from posttrain.chain.run import run
from posttrain.errors import ArtifactError, ConfigError, LaunchError
from posttrain.runs.directory import lock

pytestmark = pytest.mark.usefixtures("forked_processes")


def tensors(chain, stage):
    return (chain.parent / "runs" / stage / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_chain_skips_finished_stages_and_reruns_changed_ones(chain, capfd):
    assert actions(chain) == {"sft": "run", "dpo": "run", "reward": "run"}
    run(read_chain(chain))
    out = capfd.readouterr().out
    assert re.search(r"sft .*trained", out.replace("\n", " "))
    assert actions(chain) == {"sft": "skip", "dpo": "skip", "reward": "skip"}

    edit(chain.parent / "dpo.yaml", "beta: 0.1", "beta: 0.2")
    plans = {p.stage.name: p for p in plan(read_chain(chain))}
    assert {n: p.action for n, p in plans.items()} == {"sft": "skip", "dpo": "run", "reward": "skip"}
    assert "beta: 0.1 -> 0.2" in plans["dpo"].reason

    before = tensors(chain, "dpo")
    run(read_chain(chain))
    assert tensors(chain, "dpo") != before
    kept = list((chain.parent / "runs" / ".previous").iterdir())
    assert len(kept) == 1
    assert (kept[0] / "adapter" / "adapter_model.safetensors").read_bytes() == before

    # Data are read by content: a moved file is the same file, a changed row is not.
    (chain.parent / "train.jsonl").rename(chain.parent / "moved.jsonl")
    edit(chain.parent / "sft.yaml", "train.jsonl", "moved.jsonl")
    assert set(actions(chain).values()) == {"skip"}
    edit(chain.parent / "moved.jsonl", '" receive"', '" receives"')
    assert set(actions(chain).values()) == {"run"}
    edit(chain.parent / "moved.jsonl", '" receives"', '" receive"')

    # A finished stage that was altered is refused, not trained on.
    config = chain.parent / "runs" / "sft" / "adapter" / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ArtifactError, match=r"adapter_config.json was altered"):
        plan(read_chain(chain))


def test_a_stage_that_another_process_trains_is_not_moved_aside(chain):
    """Its next checkpoint would be written into the new run."""
    run_dir = chain.parent / "runs" / "sft"
    run_dir.mkdir(parents=True)
    (run_dir / "stage.json").write_text('{"key": "of another configuration"}')
    (chain.parent / "runs" / "chain.json").write_text('{"name": "tiny", "file": ""}')
    held = lock(run_dir)
    with pytest.raises(LaunchError, match="another process is training"):
        run(read_chain(chain))
    held.close()
    assert (run_dir / "stage.json").is_file()


def test_dry_run_touches_nothing(chain, capsys):
    run(read_chain(chain), dry_run=True)
    assert "not there yet" in capsys.readouterr().out
    assert not (chain.parent / "runs").exists()


def test_another_chains_directory_is_refused(chain):
    folder = chain.parent / "runs"
    folder.mkdir()
    (folder / "chain.json").write_text(json.dumps({"name": "theirs", "file": "/x.yaml"}))
    with pytest.raises(ArtifactError, match=r"belongs to the chain 'theirs'"):
        run(read_chain(chain))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("policy: sft", "policy: sfd", r"names no stage: 'sfd'; did you mean 'sft'\?"),
        ("recipe: dpo", "recipe: dpq", r"unknown recipe 'dpq'"),
        ("{policy: sft}", "{polcy: sft}", r"dpo has no input 'polcy'"),
        ("{recipe: sft, config: sft.yaml}", "{recipe: sft, config: sft.yaml, inputs: {policy: dpo}}", r"cycle"),
        ("config: sft.yaml", "config: no.yaml", r"no.yaml: no such file"),
        ("launch:", "lunch:", r"unknown key 'lunch'; did you mean 'launch'\?"),
        ("name: tiny", "name: a/b", r"name must be a word"),
    ],
)
def test_an_invalid_chain_is_refused_with_the_place(chain, old, new, message):
    edit(chain, old, new)
    with pytest.raises(ConfigError, match=message):
        read_chain(chain)


def test_a_typo_in_a_stage_is_reported_by_posttrain_run(chain):
    edit(chain.parent / "dpo.yaml", "beta", "betta")
    done = subprocess.run([PYTHON, "-m", "posttrain.cli", "run", str(chain)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "dpo.yaml: unknown key 'betta'; did you mean 'beta'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failed_gate_stops_the_chain_and_keeps_everything(chain):
    """The command, `accelerate launch` and the recipe each run in a new interpreter."""
    edit(chain.parent / "sft.yaml", "gates: {stops: 0}", "gates: {stops: 1}")
    edit(chain.parent / "sft.yaml", "max_new_tokens: 4", "max_new_tokens: 1")
    command = [PYTHON, "-m", "posttrain.cli", "run", str(chain)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "stops: 0, must be at least 1" in done.stderr
    assert "Traceback" not in done.stderr
    runs = chain.parent / "runs"
    assert (runs / "sft" / "adapter" / "adapter_model.safetensors").is_file()
    assert not (runs / "sft" / "lineage.json").exists()
    assert not (runs / "dpo").exists()
