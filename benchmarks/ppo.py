"""`posttrain.ppo` against TRL's last PPO trainer (1.12), in turn in one run.

    python benchmarks/ppo.py cost                # time and memory of an update; --rounds 3 --updates 4
    python benchmarks/ppo.py learning            # reward against KL on a counting task; --seeds 1 2 3
    python benchmarks/ppo.py scale --size 8b     # ours alone, random weights: tokens/s, share of peak, memory

TRL 1.12 is installed without dependencies into a separate folder, which only its own process imports. Both trainers run
as `ppo_contestant.py`, in turn, with the same model, prompts, batch and threads. `cost` needs the demo's model and
data, which `posttrain demo --dry-run` prepares; `learning` needs neither. With a GPU everything runs on it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from seeds import student
from train import matmul_gflops

from posttrain.demo.packages import CACHE
from posttrain.demo.spelling import DATA_DIR, MODEL_DIR
from posttrain.launch import die_with_parent

TRL, TRL_VERSION = CACHE / "trl-1.12.0", "1.12.0"
OURS = {"head": "ours, value head", "adapter": "ours, value adapter"}
PHASES = ("generation", "scoring", "evaluating", "forward", "backward")
PROMPTS, WORDS_PER_PROMPT = 64, 12
KL_LEVELS, SMOOTHED = (5, 10, 20, 40), 3  # nats per completion; updates


def install_trl() -> None:
    """Install TRL 1.12 into the cache if it is not there."""
    if not (TRL / "trl").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(TRL), f"trl=={TRL_VERSION}"], check=True)


def contestant(name: str, task: str, work: Path, **options: object) -> dict:
    """Run one contestant to its end and return what it reports, with the peak memory of its process."""
    paths = [str(TRL)] if name == "trl" else []
    threads = (
        1 if task == "learning" else len(os.sched_getaffinity(0))
    )  # the small model of the counting task wants one
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    report = work / "report.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("ppo_contestant.py")), name, task, str(work)]
    command.append(json.dumps(options))
    log = work / f"{task}-{name}.log"
    with log.open("w") as out:
        code = subprocess.run(command, env=env, stdout=out, stderr=out, preexec_fn=die_with_parent).returncode
    if code != 0:
        raise SystemExit(f"{' '.join(command)}\nended with {code}:\n{log.read_text()[-3000:]}")
    return dict(json.loads(report.read_text(encoding="utf-8")))


def write_prompts(work: Path) -> None:
    """Conversations of WORDS_PER_PROMPT typos each: about 50 tokens with the template's."""
    lines = (DATA_DIR / "train.jsonl").read_text(encoding="utf-8").splitlines()[: PROMPTS * WORDS_PER_PROMPT]
    typos = [json.loads(line)["prompt"][0]["content"] for line in lines]
    rows = [" ".join(typos[i::PROMPTS]) for i in range(PROMPTS)]
    prompts = [[{"role": "user", "content": f"Explain these words: {row}"}] for row in rows]
    (work / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")


def cost(rounds: int, updates: int) -> None:
    work = Path(tempfile.mkdtemp(prefix="posttrain-ppo-"))
    write_prompts(work)
    contestants = {"trl": f"TRL {TRL_VERSION}", **OURS}
    found: dict[str, list[dict]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name, title in contestants.items():
            r = contestant(name, "cost", work, model=str(MODEL_DIR), updates=updates)
            found[name].append(r)
            print(f"round {number + 1}  {title:<22} {statistics.median(r['seconds']):6.1f} s per update", flush=True)

    def ratio(name: str, value: str) -> float:
        pairs = zip(found[name], found["trl"], strict=True)
        return statistics.median(_median(ours[value]) / _median(theirs[value]) for ours, theirs in pairs)

    columns = "".join(f"{phase:>12}" for phase in PHASES)
    print(f"\n{'':<22} {'s/update':>9} {'ratio':>6} {'peak memory':>12} {'ratio':>6}{columns} {'trained':>12}")
    for name, title in contestants.items():
        runs = found[name]
        seconds = statistics.median(_median(r["seconds"]) for r in runs)
        peak = statistics.median(r["peak_bytes"] for r in runs) / 2**30
        phases = "".join(f"{statistics.median(r['phases'][p] for r in runs):10.2f} s" for p in PHASES)
        print(
            f"{title:<22} {seconds:9.2f} {ratio(name, 'seconds'):6.2f} {peak:8.2f} GiB {ratio(name, 'peak_bytes'):6.2f}"
            f"{phases} {runs[0]['trained']:12,}"
        )
    lengths = ", ".join(f"{title} {found[name][0]['tokens']:.1f}" for name, title in contestants.items())
    print(f"mean tokens per completion: {lengths}; device: {found['trl'][0]['device']}")


def scale(size: str, batch: int, updates: int) -> None:
    """Tokens/s of rollout and update; a LoRA update costs 4 FLOP per weight and token."""
    work = Path(tempfile.mkdtemp(prefix="posttrain-ppo-"))
    peak = matmul_gflops(4096, 4096, 4096)
    print(f"{size}, rollouts of {batch}; large matrix products: {peak:,.0f} GFLOP/s")
    for name, title in OURS.items():
        r = contestant(name, "scale", work, size=size, batch=batch, updates=updates)
        drawn = r["rollout_size"] * r["tokens"]
        trained = drawn + r["rollout_size"] * r["prompt_tokens"]
        # On CUDA a phase ends before its kernels do, but those of a rollout are waited for.
        seconds, phases = _median(r["seconds"]), r["phases"]
        update = seconds - phases["generation"] - phases["scoring"] - phases["evaluating"]
        share = 4e-9 * r["parameters"] * trained / update / peak
        print(
            f"{title:<22} rollout {drawn / phases['generation']:,.0f} tokens/s, "
            f"update {trained / update:,.0f} tokens/s "
            f"({share:.0%} of peak), {seconds:.2f} s in all, {r['peak_bytes'] / 2**30:.2f} GiB, {r['device']}",
            flush=True,
        )


def _median(value: object) -> float:
    return statistics.median(value) if isinstance(value, list) else float(value)


def learning(seeds: list[int], coefficients: list[float], updates: int) -> None:
    """Each trainer's reward and KL at the end, and its frontier: the reward at which its KL first passes each level."""
    work = Path(tempfile.mkdtemp(prefix="posttrain-ppo-"))
    contestants = {"trl": f"TRL {TRL_VERSION}", **OURS}
    passed: dict[str, dict[int, list[float]]] = {name: {level: [] for level in KL_LEVELS} for name in contestants}
    print(f"the last quarter of {updates} updates\n{'KL weight':>9}  {'':<22} {'reward':>22} {'KL, nats':>22}")
    for coefficient in coefficients:
        for name, title in contestants.items():
            runs = [
                contestant(name, "learning", work, seed=seed, kl_coef=coefficient, updates=updates) for seed in seeds
            ]
            ends = [[statistics.mean(r[what][-(updates // 4) :]) for r in runs] for what in ("reward", "kl")]
            print(f"{coefficient:9g}  {title:<22}" + "".join(f" {_over_seeds(v):>22}" for v in ends), flush=True)
            for level in KL_LEVELS:
                passed[name][level] += [reward_at(level, r["kl"], r["reward"]) for r in runs]
    print(f"\nreward where KL passes\n{'':<22}" + "".join(f" {f'{level} nats':>22}" for level in KL_LEVELS))
    for name, title in contestants.items():
        cells = ""
        for level in KL_LEVELS:
            known = [reward for reward in passed[name][level] if reward == reward]
            cells += f" {_over_seeds(known) if known else '':>22}"
        print(f"{title:<22}{cells}")
    print(f"{'ours - TRL, paired':<22}")
    for name, title in OURS.items():
        cells = ""
        for level in KL_LEVELS:
            pairs = zip(passed[name][level], passed["trl"][level], strict=True)
            differences = [a - b for a, b in pairs if a == a and b == b]
            cells += f" {_over_seeds(differences, '+') if differences else '':>22}"
        print(f"{title:<22}{cells}")


def reward_at(level: float, kls: list[float], rewards: list[float]) -> float:
    """The reward where KL first passes `level`, interpolated between two updates; NaN if it never does. Both are means
    over SMOOTHED updates, so that noise does not look like an early crossing."""

    def smooth(values: list[float]) -> list[float]:
        return [statistics.mean(values[i : i + SMOOTHED]) for i in range(len(values) - SMOOTHED + 1)]

    kls, rewards = smooth(kls), smooth(rewards)
    for i in range(1, len(kls)):
        if kls[i - 1] < level <= kls[i]:
            share = (level - kls[i - 1]) / (kls[i] - kls[i - 1])
            return rewards[i - 1] + share * (rewards[i] - rewards[i - 1])
    return float("nan")


def _over_seeds(values: list[float], sign: str = "") -> str:
    mean, half = student(values)
    return f"{mean:{sign}.3f} [{mean - half:{sign}.3f}, {mean + half:{sign}.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="task", required=True)
    costs = commands.add_parser("cost")
    costs.add_argument("--rounds", type=int, default=3)
    costs.add_argument("--updates", type=int, default=4)
    learns = commands.add_parser("learning")
    learns.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    learns.add_argument("--kl", type=float, nargs="+", default=[0.003, 0.01, 0.03])
    learns.add_argument("--updates", type=int, default=60)
    scales = commands.add_parser("scale")
    scales.add_argument("--size", choices=["tiny", "135m", "1b", "8b"], default="135m")
    scales.add_argument("--batch", type=int, default=16)
    scales.add_argument("--updates", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.task == "scale":
        scale(arguments.size, arguments.batch, arguments.updates)
        return
    install_trl()
    if arguments.task == "cost":
        cost(arguments.rounds, arguments.updates)
    else:
        learning(arguments.seeds, arguments.kl, arguments.updates)


if __name__ == "__main__":
    main()
