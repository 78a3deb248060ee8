"""What `posttrain submit` refuses, on a real controller: one clear message, and nothing is left queued."""

import json
import re
import subprocess

import pytest

from slurm.conftest import posttrain

pytestmark = pytest.mark.slurm

SFT_REWARD = {"sft": "", "reward": ", inputs: {policy: sft}"}


@pytest.fixture
def frozen(cluster):
    """The nodes take no jobs: what is submitted stays in the queue."""
    cluster.slurm("scontrol", "update", "PartitionName=main", "State=DOWN")
    yield
    cluster.slurm("scontrol", "update", "PartitionName=main", "State=UP")


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (", partition: gpuu", r"invalid partition specified: gpuu"),
        (", partition: members, account: guests", r"reward: Slurm would let it wait forever: .*members allows lab"),
        (", nodes: 3", r"Requested node configuration is not available"),
        (", constraint: h100", r"Invalid feature specification"),
    ],
)
def test_what_slurm_refuses_for_the_second_stage_leaves_no_first_one(cluster, write_chain, launch, message):
    chain = write_chain({"sft": "", "reward": f", inputs: {{policy: sft}}, launch: {{slurm: {{nodes: 2{launch}}}}}"})
    said = posttrain("submit", chain, expect=2)
    assert re.search(message, said.splitlines()[-1])
    assert said.count("LaunchError") == 1
    assert cluster.queued() == []
    assert "not submitted" in posttrain("status", chain)


def test_dependencies_are_kept_by_slurm_and_a_second_submission_adds_nothing(cluster, write_chain, frozen):
    chain = write_chain({**SFT_REWARD, "dpo": ", inputs: {policy: sft}"})
    posttrain("submit", chain)
    jobs = json.loads((chain.parent / "runs" / ".slurm" / "jobs.json").read_text())
    assert sorted(cluster.queued()) == sorted(jobs.values())
    for child in ("reward", "dpo"):
        found = cluster.job(jobs[child])
        assert found["Dependency"] == f"afterok:{jobs['sft']}(unfulfilled)"
        assert found["Requeue"] == "1"
    again = posttrain("submit", chain)
    assert len(re.findall(r"^queued ", again, re.MULTILINE)) == 3
    assert len(cluster.queued()) == 3
    assert "waits for sft" in posttrain("status", chain)

    # Without jobs.json too: a job carries what it is.
    (chain.parent / "runs" / ".slurm" / "jobs.json").unlink()
    assert len(re.findall(r"^queued ", posttrain("submit", chain), re.MULTILINE)) == 3

    # A job that waits would run another configuration than the one that is written now.
    (chain.parent / "dpo.yaml").write_text((chain.parent / "dpo.yaml").read_text() + "beta: 0.3\n")
    said = posttrain("submit", chain, expect=2)
    assert f"stage dpo: its job {jobs['dpo']} is PENDING with another configuration" in said
    assert len(cluster.queued()) == 3
    said = posttrain("cancel", chain)
    assert said.count("cancelled") == 3
    assert cluster.queued() == []


def test_stale_and_foreign_ids(cluster, write_chain, frozen, tmp_path):
    chain = write_chain(SFT_REWARD)
    ids = tmp_path / "runs" / ".slurm" / "jobs.json"
    script = tmp_path / "other.sh"
    script.write_text("#!/bin/bash\n")
    other = cluster.slurm("sbatch", "--parsable", "--output=/dev/null", "--job-name=thesis", str(script)).strip()
    posttrain("submit", chain, "--dry-run")
    ids.write_text(json.dumps({"sft": other}))
    said = posttrain("submit", chain, expect=2)
    assert f"job {other} of the stage sft is 'thesis' of user root, not this chain's" in said
    assert cluster.queued() == [other]

    # One that Slurm has forgotten is neither depended on nor in the way.
    ids.write_text(json.dumps({"sft": "99999"}))
    said = posttrain("submit", chain)
    assert "job 99999 is no longer known to Slurm" in said
    sft = json.loads(ids.read_text())["sft"]
    assert cluster.job(json.loads(ids.read_text())["reward"])["Dependency"] == f"afterok:{sft}(unfulfilled)"
    posttrain("cancel", chain)

    said = posttrain("submit", chain, "--after", "99999", expect=2)
    assert "--after 99999: Slurm does not know this job" in said
    said = posttrain("submit", chain, "--after", sft, expect=2)
    assert "has ended as CANCELLED" in said
    assert cluster.queued() == [other]
    posttrain("submit", chain, "--after", other)
    sft = json.loads(ids.read_text())["sft"]
    assert cluster.job(sft)["Dependency"] == f"afterok:{other}(unfulfilled)"


def test_a_full_disk_is_found_before_anything_is_submitted(cluster, write_chain, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], check=True)
    try:
        chain = write_chain(SFT_REWARD, output_dir=disk / "runs")
        (disk / "ballast").write_bytes(b"x" * 12 * 1024)
        said = posttrain("submit", chain, expect=2)
        assert "no space left on the device" in said
        assert cluster.queued() == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
