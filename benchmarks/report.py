"""Time, memory and file size of the report of a chain with 200,000 logged steps.

    python benchmarks/report.py                    # --steps 200000 --rounds 3

The steps are divided over four stages, whose logs have one line per step with what the trainers log, and PPO's four
completions per step. Writing the logs is not timed. Each round is one process, `posttrain report`, from start to end;
on a busy machine, CPU seconds are more reliable than wall time. Peak memory is the kernel's count.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

STAGES = ("sft", "reward", "dpo", "ppo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200_000, help="in all, shared by the stages that train")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chain = write(Path(folder), arguments.steps // len(STAGES))
        size = sum(p.stat().st_size for p in chain.output_dir.rglob("*.jsonl")) / 1e6
        print(f"{arguments.steps:,} logged steps in {len(STAGES)} stages, {size:,.0f} MB of logs")
        begun = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = [build(chain.path) for _ in range(arguments.rounds)]
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = (ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime) / arguments.rounds
        report = chain.output_dir / "report.html"
        peak = ended.ru_maxrss / 2**20
        words = ", ".join(f"{s:.1f}" for s in seconds)
        print(f"posttrain report: {statistics.median(seconds):.1f} s (rounds: {words}), {cpu:.1f} s of one core")
        print(f"report.html: {report.stat().st_size / 1e6:.2f} MB; peak memory {peak:.2f} GiB")


def write(folder: Path, steps: int):  # type: ignore[no-untyped-def]
    """A chain whose stages are complete, with long logs."""
    from report.planted import logs, plant

    chain = plant(folder)
    for name in STAGES:
        rng = random.Random(name)
        run_dir = chain.run_dir(name)
        with (run_dir / "metrics.jsonl").open("w") as file:
            for step in range(1, steps + 1):
                about = {"step": step, "max_steps": steps, "epoch": step / steps, "time": 1e9 + step, "left_s": 1.0}
                file.write(json.dumps(about | logs(name, step, steps, rng)) + "\n")
        if name == "ppo":
            with (run_dir / "completions.jsonl").open("w") as file:
                for row in range(4 * steps):
                    score = rng.gauss(row / steps, 1)
                    file.write(
                        json.dumps({"step": row // 4 + 1, "prompt": "teh", "completion": "the", "score": score}) + "\n"
                    )
    return chain


def build(chain: Path) -> float:
    """Seconds of one `posttrain report`."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "posttrain.cli", "report", str(chain)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
