"""Chains on two real nodes: undisturbed, and with everything that a cluster may do to a job."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT
from posttrain.chain.graph import read_chain
from posttrain.chain.status import collect
from posttrain.launch import environment
from slurm.cluster import Cluster, wait_until
from slurm.conftest import posttrain

pytestmark = pytest.mark.slurm

RUN_S = 900  # for one start of a stage, on a machine that is busy with other things
STAGES = {
    "sft": "",
    "sample": ", inputs: {policy: sft}",
    "reward": ", inputs: {policy: sft, data: sample}",
    "dpo": ", inputs: {policy: sft}",
    "ppo": ", inputs: {policy: sft, reward: reward}",
}
STEPS_PER_EPOCH = 3  # 12 rows, 2 per process, 2 processes
DDP = ROOT / "accelerate_configs" / "ddp.yaml"


@pytest.fixture(scope="module")
def reference(material, tmp_path_factory):
    """The chain as a user of one machine runs it: two processes side by side."""
    folder = tmp_path_factory.mktemp("local")
    lines = "".join(f"  {s}: {{recipe: {s}, config: {material}/{s}.yaml{more}}}\n" for s, more in STAGES.items())
    (folder / "chain.yaml").write_text(f"name: tiny\noutput_dir: {folder}/runs\nstages:\n{lines}")
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(DDP), "--num_processes", "2",
         str(Path(__file__).with_name("local.py")), str(folder / "chain.yaml")],
        env=environment(DDP), timeout=RUN_S, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return folder / "runs"


def result(runs: Path, stage: str) -> bytes:
    if stage == "sample":
        return b"".join((runs / stage / "data" / f"{part}.jsonl").read_bytes() for part in ("train", "validation"))
    return (runs / stage / "adapter" / "adapter_model.safetensors").read_bytes()


def last_step(first_asked: int) -> int:
    """The step after which a run stops that is asked to before the end of `first_asked`: none that ends an epoch."""
    return first_asked + (first_asked % STEPS_PER_EPOCH == 0)


def jobs_of(chain: Path) -> dict[str, str]:
    return json.loads((chain.parent / "runs" / ".slurm" / "jobs.json").read_text())


def state_of(cluster: Cluster, job: str) -> str:
    return cluster.job(job)["JobState"]


def finished(cluster: Cluster, chain: Path, stage: str) -> bool:
    """Whether a stage's job is complete. If it ended in any other state, fail at once and show its logs."""
    state = state_of(cluster, jobs_of(chain)[stage])
    assert state in ("PENDING", "RUNNING", "COMPLETING", "COMPLETED"), posttrain("status", chain)
    return state == "COMPLETED"


def test_all_stages_on_two_nodes_end_as_two_local_processes_do(cluster, write_chain, reference):
    chain = write_chain(STAGES)
    posttrain("submit", chain)
    for stage in STAGES:
        wait_until(lambda stage=stage: finished(cluster, chain, stage), f"{stage} is finished", RUN_S)
    runs = chain.parent / "runs"
    for stage in STAGES:
        state = runs / ".slurm" / stage
        assert "rank 0 of 2 on node n1" in (state / "rank-0.log").read_text()
        assert "rank 1 of 2 on node n2" in (state / "rank-1.log").read_text()
        assert "roll call: all 2 nodes" in (state / "node-1.log").read_text()
        assert "all-reduce over 2 ranks on 2 nodes" in (state / "rank-0.log").read_text()
        assert result(runs, stage) == result(reference, stage), stage
    assert json.loads((runs / "dpo" / "lineage.json").read_text())["world_size"] == 2
    assert posttrain("status", chain).count("complete") == 5
    assert posttrain("submit", chain).count("skip ") == 5
    assert cluster.queued() == []


# Disturbances


class Disturbed:
    """A stage that is running, and the processes of its recipe on both nodes."""

    def __init__(self, cluster: Cluster, chain: Path, stage: str) -> None:
        self.cluster, self.chain, self.stage = cluster, chain, stage
        self.job = jobs_of(chain)[stage]
        self.run_dir = chain.parent / "runs" / stage
        self.state = chain.parent / "runs" / ".slurm" / stage

    def wait(self, condition, what, limit_s=RUN_S):
        def met():
            assert state_of(self.cluster, self.job) in ("PENDING", "RUNNING", "COMPLETING"), self.said()
            return condition()

        wait_until(met, f"{self.stage}: {what}\n{self.said()}", limit_s)

    def said(self) -> str:
        return "\n".join(f"-- {p}\n{p.read_text()[-2000:]}" for p in sorted(self.state.glob("*.log")))

    def ranks(self, node: str) -> list[int]:
        """The recipe's processes on a node."""
        found = []
        for pid in self.cluster.processes(node):
            with contextlib.suppress(OSError):
                if f"recipes/{self.stage}.py" in Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "):
                    found.append(pid)
        return found

    def all_ranks(self) -> list[int]:
        return [pid for node in self.cluster.nodes for pid in self.ranks(node)]

    def started(self, restarts: int) -> bool:
        """Whether both ranks of this start have opened their logs."""
        header = f"restart {restarts},"
        logs = [self.state / f"rank-{rank}.log" for rank in (0, 1)]
        return all(log.is_file() and header in log.read_text() for log in logs) and len(self.all_ranks()) == 2

    def step(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return max((int(found[1]) for line in lines if (found := re.match(r'\{"step": (\d+)', line))), default=0)

    def freeze_at(self, step: int) -> int:
        """Hold both ranks still once they have passed a step, before the end."""
        end = time.monotonic() + RUN_S
        while self.step() < step:
            assert time.monotonic() < end, self.said()
            time.sleep(0.01)
        self.signal(signal.SIGSTOP)
        assert self.step() < 12, "the machine is faster than this test"
        return self.step()

    def freeze_in_a_save(self) -> Path:
        """Hold rank 0 still while it writes a checkpoint; return the folder that is not whole yet."""
        rank0 = self.ranks("n1")[0]
        end = time.monotonic() + RUN_S
        while time.monotonic() < end:
            partial = self.partial()
            if partial is not None:
                os.kill(rank0, signal.SIGSTOP)
                time.sleep(0.05)  # what it had handed to the kernel is done now
                if self.partial() is not None:
                    return partial
                os.kill(rank0, signal.SIGCONT)
            time.sleep(0.001)
        raise AssertionError(self.said())

    def partial(self) -> Path | None:
        found = sorted(self.run_dir.glob("checkpoints/checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        return found[-1] if found and not (found[-1] / "trainer_state.json").exists() else None

    def signal(self, number: int) -> None:
        for pid in self.all_ranks():
            os.kill(pid, number)

    def ask(self) -> None:
        """What Slurm sends before the time limit, and an administrator by hand."""
        self.cluster.slurm("scancel", "--batch", "--signal=USR1", self.job)
        self.wait((self.state / "stop").exists, "the request has arrived")

    def restarts(self) -> int:
        return int(self.cluster.job(self.job)["Restarts"])

    def wait_for_restart(self, count: int) -> None:
        self.wait(lambda: self.restarts() == count, f"it starts again, number {count}")
        self.wait(lambda: self.started(count), f"the ranks of start {count} are up")


def test_a_disturbed_chain_ends_as_the_undisturbed_one(cluster, write_chain, reference):
    """USR1 at three moments, a time limit, a dead slurmd, a dead node; then a finished chain with the same tensors."""
    long, short = ", launch: {slurm: {signal_s: 1800}}", ", launch: {slurm: {signal_s: 120}}"
    chain = write_chain({"sft": long, "dpo": f"{STAGES['dpo']}{short}"})
    posttrain("submit", chain)

    # USR1 before the trainer is up: the first step is the last one.
    job = Disturbed(cluster, chain, "sft")
    job.wait(lambda: job.started(0), "the ranks are up")
    assert job.step() == 0
    job.ask()
    job.wait_for_restart(1)
    assert "stopped as asked, after step 1;" in (job.state / "rank-0.log").read_text()
    assert (job.run_dir / "checkpoints" / "checkpoint-1" / "trainer_state.json").is_file()

    # During a save.
    cut = job.freeze_in_a_save()
    job.ask()
    job.signal(signal.SIGCONT)
    job.wait_for_restart(2)
    at = last_step(int(cut.name.split("-")[1]) + 1)
    for rank in (0, 1):
        assert f"stopped as asked, after step {at};" in (job.state / f"rank-{rank}.log").read_text()

    # kill -9 of the first node's slurmd: Slurm gives the node up, and takes the job from it. What still runs there, the
    # batch script first of all, must not have a say about the job's next start.
    job.freeze_at(at + 1)
    os.kill(cluster.slurmd("n1"), signal.SIGKILL)
    job.wait(lambda: cluster.states()[0].startswith("down") and job.restarts() == 3, "n1 is down, the job requeued")
    cluster.kill(cluster.processes("n1"))  # the node is started anew
    cluster.start_node("n1")
    job.wait_for_restart(3)
    wait_until(lambda: finished(cluster, chain, "sft"), "sft is finished", RUN_S)
    assert not (job.state / "failures").exists()
    log = (job.state / "rank-0.log").read_text()
    assert [log.count(f"restart {n}, ") for n in range(5)] == [1, 1, 1, 1, 0]
    assert log.count("resuming from") == 3

    # USR1 in the middle of training.
    job = Disturbed(cluster, chain, "dpo")
    job.wait(lambda: job.started(0), "the ranks are up")
    at = job.freeze_at(2)
    job.ask()
    job.signal(signal.SIGCONT)
    job.wait_for_restart(1)
    at = last_step(at + 1)
    assert f"stopped as asked, after step {at};" in (job.state / "rank-0.log").read_text()

    # A real time limit: two minutes more than what it has had.
    at = job.freeze_at(at + 1)
    minutes = sum(
        int(n) * unit for n, unit in zip(cluster.job(job.job)["RunTime"].split(":")[:2], (60, 1), strict=True)
    )
    cluster.slurm("scontrol", "update", f"JobId={job.job}", f"TimeLimit={minutes + 3}")
    job.wait((job.state / "stop").exists, "Slurm says that the time is nearly over")
    job.signal(signal.SIGCONT)
    job.wait(lambda: job.restarts() == 2, "it is requeued")
    cluster.slurm("scontrol", "update", f"JobId={job.job}", "TimeLimit=UNLIMITED")
    job.wait_for_restart(2)
    at = last_step(at + 1)
    assert f"stopped as asked, after step {at};" in (job.state / "rank-0.log").read_text()
    assert not (job.state / "failures").exists()

    # kill -9 of every process of the second node.
    job.freeze_at(at + 1)
    cluster.kill(cluster.processes("n2"))
    job.signal(signal.SIGCONT)
    wait_until(lambda: job.restarts() > 2, f"the job is requeued\n{job.said()}", RUN_S)
    cluster.start_node("n2")
    wait_until(lambda: finished(cluster, chain, "dpo"), "dpo is finished", RUN_S)
    status = {row.name: row for row in collect(read_chain(chain))}
    assert status["sft"].restarts == "3 (3 preempted or node lost, 0 failed)"
    # Whether the ranks notice first (a failure) or Slurm does (a lost node) is a matter of seconds.
    assert re.match(r"[34] \([23] preempted or node lost, [01] failed\)", status["dpo"].restarts)

    for stage in ("sft", "dpo"):
        assert result(chain.parent / "runs", stage) == result(reference, stage), stage
