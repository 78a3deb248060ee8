"""Time from `posttrain submit` to the first training step, against a bare batch script that launches TRL's trainer.

    python benchmarks/submit.py --rounds 3

Both run in turn, with a tiny model and two ranks, on a two-node Slurm cluster on this machine (tests/slurm/cluster.py:
needs root and Slurm's packages). Timing starts with the command and ends with the first logged step; the bare script
has no checks and no requeue. CPU time is that of all processes of the job on both nodes until then, which depends
little on other work on the machine.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from slurm.cluster import Cluster, missing, wait_until  # noqa: E402
from slurm.conftest import make_material  # noqa: E402

DDP = ROOT / "accelerate_configs" / "ddp.yaml"
TICKS = os.sysconf("SC_CLK_TCK")
BARE = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --cpus-per-task=2 --output={log}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
srun --cpus-per-task=2 bash -c 'exec {python} -m accelerate.commands.launch --config_file {config} --num_machines 2 \\
  --machine_rank "$SLURM_NODEID" --num_processes 2 --rdzv_backend static --same_network --main_process_ip "$0" \\
  --main_process_port $((20000 + SLURM_JOB_ID % 1000)) {script}' "$first"
"""


def used_s(cluster: Cluster) -> float:
    """CPU seconds of the jobs' processes on all nodes, their ended children included; slurmd's own are a constant."""
    total = 0.0
    for node in cluster.nodes:
        for pid in cluster.processes(node):
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            total += sum(map(int, fields[11:15])) / TICKS  # utime, stime, cutime, cstime
    return total


def measure(cluster: Cluster, command: list[str], first_step: Callable[[], bool]) -> tuple[float, float, float]:
    """Seconds that the command took; wall and CPU seconds until the first step. Then ends the job."""
    cluster.wait_idle()
    before, begun = used_s(cluster), time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    submitted = time.monotonic() - begun
    wait_until(first_step, "the first step", 1200)
    wall, cpu = time.monotonic() - begun, used_s(cluster) - before
    cluster.slurm("scancel", *cluster.queued())
    return submitted, wall, cpu


def ours(cluster: Cluster, material: Path, folder: Path) -> tuple[float, float, float]:
    chain = folder / "chain.yaml"
    chain.write_text(
        f"name: one\noutput_dir: {folder}/runs\nstages:\n  sft: {{recipe: sft, config: {material}/sft.yaml}}\n"
        f"launch: {{accelerate_config: ddp.yaml, slurm: {{nodes: 2, cpus_per_task: 2}}}}\n"
    )
    metrics = folder / "runs" / "sft" / "metrics.jsonl"
    command = [sys.executable, "-m", "posttrain.cli", "submit", str(chain)]
    return measure(cluster, command, lambda: metrics.is_file() and "loss" in metrics.read_text())


def bare(cluster: Cluster, material: Path, folder: Path) -> tuple[float, float, float]:
    log, script = folder / "log", folder / "bare.sbatch"
    words = [
        ROOT / "benchmarks" / "bare.py",
        "sft",
        material / "tiny",
        material / "rows.jsonl",
        folder / "out",
        "false",
    ]
    script.write_text(BARE.format(log=log, python=sys.executable, config=DDP, script=shlex.join(map(str, words))))
    return measure(cluster, ["sbatch", str(script)], lambda: log.is_file() and "'loss'" in log.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    if reason := missing():
        sys.exit(f"no Slurm cluster here: {reason}")
    found: dict[str, list[tuple[float, float, float]]] = {"posttrain": [], "bare": []}
    with tempfile.TemporaryDirectory() as scratch, Cluster(Path("/tmp/posttrain-slurm")) as cluster:
        os.environ |= cluster.env
        material = Path(scratch, "material")
        material.mkdir()
        make_material(material)
        for number in range(rounds):
            for name, run in (("bare", bare), ("posttrain", ours)):
                folder = Path(scratch, f"{name}-{number}")
                folder.mkdir()
                found[name].append(run(cluster, material, folder))
                submitted, wall, cpu = found[name][-1]
                print(f"{name}: command {submitted:.2f} s, first step {wall:.1f} s, CPU {cpu:.1f} s", flush=True)
    lost = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(found["posttrain"], found["bare"], strict=True)]
    print(f"\nmedians of {rounds} rounds, posttrain less bare, load {os.getloadavg()[0]:.1f}:")
    for place, what in enumerate(("the command", "wall to the first step", "CPU to the first step, two ranks")):
        print(f"{what}: {statistics.median(row[place] for row in lost):+.2f} s")


if __name__ == "__main__":
    main()
