"""Stages that fail on a real cluster: their dependents are cancelled, `status` says why, what is missing runs later."""

import json
import os
import re
import time

import pytest

from conftest import edit, small_disk
from posttrain.chain.graph import read_chain
from posttrain.chain.status import collect
from slurm.cluster import wait_until
from slurm.conftest import posttrain
from slurm.test_runs import RUN_S, jobs_of, state_of

pytestmark = pytest.mark.slurm

ONE = ", launch: {accelerate_config: cpu.yaml, slurm: {nodes: 1}}"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def wait_for_end(cluster, chain, stage):
    job = jobs_of(chain)[stage]
    wait_until(lambda: state_of(cluster, job) in ENDED, f"{stage} has ended", RUN_S)
    return state_of(cluster, job)


def statuses(chain):
    return {row.name: row for row in collect(read_chain(chain))}


@pytest.fixture
def disk(cluster):
    with small_disk(cluster.shared / "disk") as resize:
        yield resize


def test_a_failed_stage_cancels_its_dependents_and_can_be_submitted_again(cluster, write_chain, disk):
    """A disk too small for the first stage, then a broken row for the second; each mended, and submitted again."""
    out = disk("400k") / "runs"
    (out.parent / "ballast").write_bytes(b"x" * 200 * 1024)
    chain = write_chain({"sft": ONE, "reward": f", inputs: {{policy: sft}}{ONE}"}, output_dir=out)
    (chain.parent / "runs").symlink_to(out)
    posttrain("submit", chain)
    assert wait_for_end(cluster, chain, "sft") == "FAILED"
    failed = time.monotonic()
    assert wait_for_end(cluster, chain, "reward") == "CANCELLED"
    assert time.monotonic() - failed < 10
    rows = statuses(chain)
    assert re.match(r"rank 0 on n\d: LaunchError: .*GiB free, about .* needed for checkpoints", rows["sft"].why)
    assert rows["sft"].restarts == "0"  # a mistake is the same at the next start
    assert "LaunchError" in "\n".join(rows["sft"].tail)
    assert rows["reward"].why == "its input sft ended as failed"
    assert cluster.queued() == []

    disk("20m")
    pairs = chain.parent / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": " b"}\n')
    edit(chain.parent / "reward.yaml", "train_file: ", f"train_file: {pairs} # ")
    posttrain("submit", chain)
    assert wait_for_end(cluster, chain, "sft") == "COMPLETED"
    assert wait_for_end(cluster, chain, "reward") == "FAILED"
    rows = statuses(chain)
    assert (rows["sft"].state, rows["reward"].state) == ("complete", "failed")
    assert "DataError" in rows["reward"].why

    edit(chain.parent / "reward.yaml", f"train_file: {pairs} # ", "train_file: ")
    said = posttrain("submit", chain)
    assert re.search(r"^ +skip  sft", said, re.MULTILINE)
    assert list(jobs_of(chain)) == ["sft", "reward"]
    assert cluster.job(jobs_of(chain)["reward"])["Dependency"] == "(null)"
    assert wait_for_end(cluster, chain, "reward") == "COMPLETED"
    assert {row.state for row in statuses(chain).values()} == {"complete"}


def test_a_failing_rank_is_shown_and_requeued_up_to_max_failures(cluster, write_chain, monkeypatch):
    """A verifier that fails on the second node only: one requeue, as `max_failures` says, and no second one."""
    chain = write_chain({"sample": ""}, launch=", max_failures: 1")
    edit(chain.parent / "sample.yaml", "verifier: 'regex:[a-m].*'", "verifier: 'ill:judge'")
    model = re.search(r"model_name_or_path: .*", (chain.parent / "sft.yaml").read_text())[0]
    (chain.parent / "sample.yaml").write_text(f"{model}\n{(chain.parent / 'sample.yaml').read_text()}")
    (chain.parent / "ill.py").write_text(
        "import os\n\ndef judge(prompt, completion, row):\n"
        "    if os.environ['RANK'] == '1':\n        raise RuntimeError('the second rank is ill')\n"
        "    import time; time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{chain.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    posttrain("submit", chain)
    assert wait_for_end(cluster, chain, "sample") == "FAILED"
    row = statuses(chain)["sample"]
    assert row.restarts == "1 (0 preempted or node lost, 1 failed)"
    assert row.why == "rank 1 on n2: RuntimeError: the second rank is ill; 2 failures"
    assert row.tail[0].endswith("rank-1.log")
    assert "the second rank is ill" in row.tail[-1]
    state = chain.parent / "runs" / ".slurm" / "sample"
    assert (state / "rank-1.log").read_text().count("== rank 1 of 2 on node n2") == 2
    assert json.loads((state / "exit-1.rank-1").read_text())["node"] == "n2"
