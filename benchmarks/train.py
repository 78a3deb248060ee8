"""Our recipes against the command `trl` and against TRL's bare trainer, in turn, in one run.

    python benchmarks/train.py sft              # or dpo, reward; --rounds 3 --steps 8
    python benchmarks/train.py sft --gains      # each of our gains on its own

Same model, rows, rows per step, LoRA and precision (bf16 if the machine has it in hardware). A contestant is a command,
whose log lines are timed as they arrive: seconds to the first step, tokens/s over the steps after it, peak memory of
its process tree, final loss. Medians over the rounds; ratios are per round. The share of peak is relative to large
matrix products in that precision, measured here. Needs the demo's model and data, which `posttrain demo --dry-run`
prepares.
"""

import argparse
import itertools
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from posttrain.demo.spelling import DATA_DIR, MODEL_DIR
from posttrain.launch import ROOT, accelerate_config, build_command, die_with_parent, environment
from posttrain.models.precision import has_bf16

ROWS_PER_STEP = 16
CPU = accelerate_config("cpu.yaml", ROOT)

# SmolLM2's trunk multiplies each token by 106M weights. With LoRA a token costs 2 FLOP a weight forward and 2 backward
# (to the activations only), and DPO's reference another 2 forward. The head and what an adapter adds are not counted.
TRUNK_WEIGHTS = 106_168_320
FLOP_A_WEIGHT = {"sft": 4, "dpo": 6, "reward": 4}


@dataclass
class Result:
    """One run of one contestant."""

    first_step_s: float
    tokens_per_s: float
    peak_rss_bytes: int
    loss: float


def make_rows(task: str, folder: Path, steps: int) -> Path:
    """`steps` x ROWS_PER_STEP conversations: a user turn of 1 to 12 typos, and their correction."""
    source = [json.loads(line) for line in (DATA_DIR / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    words = ((row["prompt"][0]["content"], row["completion"][0]["content"]) for row in itertools.cycle(source))
    lengths = random.Random(0)
    rows = []
    for _ in range(steps * ROWS_PER_STEP):
        chosen = list(itertools.islice(words, lengths.randint(1, 12)))
        typos, right = (" ".join(side) for side in zip(*chosen, strict=True))
        prompt = [{"role": "user", "content": typos}]
        answer, other = ([{"role": "assistant", "content": text}] for text in (right, typos))
        if task == "sft":
            rows.append({"prompt": prompt, "completion": answer})
        else:
            rows.append({"prompt": prompt, "chosen": answer, "rejected": other})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


COMMON = {
    "per_device_train_batch_size": str(ROWS_PER_STEP),
    "num_train_epochs": "1",
    "learning_rate": "1e-4",
    "lr_scheduler_type": "constant",
    "logging_steps": "1",
    "max_length": "256",
    "bf16": str(has_bf16()).lower(),
    "use_cpu": "true",
    "report_to": "none",
    "save_strategy": "no",
    "seed": "0",
}


def ours(task: str, rows: Path, out: Path, **changes: str) -> list[str]:
    options = {**COMMON, "gradient_checkpointing": "false", "train_sampling_strategy": "group_by_length", **changes}
    arguments = ["--model_name_or_path", str(MODEL_DIR), "--train_file", str(rows), "--output_dir", str(out)]
    arguments += [word for key, value in options.items() for word in (f"--{key}", value)]
    arguments += ["--gates.stops", "0"] if task != "reward" else []
    return build_command(task, arguments, CPU)


def without(part: str, command: list[str]) -> list[str]:
    """The same command with TRL's own `head`, or PEFT's own `lora`, through `upstream.py`."""
    at = next(i for i, word in enumerate(command) if word.startswith(str(ROOT / "recipes")))
    script = str(Path(__file__).with_name("upstream.py"))
    return [*command[:at], script, part, Path(command[at]).stem, *command[at + 1 :]]


def trl_cli(task: str, rows: Path, out: Path) -> list[str]:
    """TRL's own command, with its defaults: one thread per process (accelerate's), gradient checkpointing on."""
    options = {**COMMON, "disable_tqdm": "true"}
    command = [str(Path(sys.executable).parent / "trl"), task, "--model_name_or_path", str(MODEL_DIR)]
    command += ["--dataset_name", str(rows.parent), "--output_dir", str(out), "--use_peft"]
    command += ["--lora_r", "16", "--lora_alpha", "32", "--lora_target_modules", "all-linear", "--dtype", "float32"]
    if task == "reward":
        command += ["--lora_task_type", "SEQ_CLS"]
    return command + [word for key, value in options.items() for word in (f"--{key}", value)]


def bare(task: str, rows: Path, out: Path) -> list[str]:
    return [
        sys.executable,
        str(Path(__file__).with_name("bare.py")),
        task,
        str(MODEL_DIR),
        str(rows),
        str(out),
        COMMON["bf16"],
    ]


_STEP = re.compile(r"^step \d+/\d+  loss|'loss':")


def measure(command: list[str], out: Path, env: dict[str, str], tokens: float) -> Result:
    """Run a command, time its logged steps as they arrive, and record its process tree's peak memory."""
    shutil.rmtree(out, ignore_errors=True)
    begun, arrivals, losses, peak = time.monotonic(), [], [], 0
    stderr = out.with_suffix(".stderr")
    with stderr.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env, cwd=ROOT, preexec_fn=die_with_parent
        )

        def watch() -> None:
            nonlocal peak
            while process.poll() is None:
                total = 0
                try:
                    root = psutil.Process(process.pid)
                    for p in [root, *root.children(recursive=True)]:
                        total += p.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
                peak = max(peak, total)
                time.sleep(0.1)

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert process.stdout is not None
        for line in process.stdout:
            if _STEP.search(line):
                arrivals.append(time.monotonic())
                losses.append(float(re.search(r"loss'?:? '?([0-9.]+)", line).group(1)))
        code = process.wait()
        watcher.join()
    if code != 0:
        raise SystemExit(f"{' '.join(command)}\nended with {code}:\n{stderr.read_text()[-2000:]}")
    steps = len(arrivals)
    return Result(
        arrivals[0] - begun,
        tokens * (steps - 1) / steps / (arrivals[-1] - arrivals[0]),
        peak,
        statistics.mean(losses[-4:]),
    )


def count_tokens(rows: Path) -> int:
    """Tokens of one epoch, padding not counted."""
    from transformers import AutoTokenizer

    from posttrain.data.conversation import join, render

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    parsed = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    sides = ("completion", "chosen", "rejected")
    return sum(len(render(join(row["prompt"], row[s]), tokenizer)) for row in parsed for s in sides if s in row)


def matmul_gflops(m: int, k: int, n: int) -> float:
    import torch

    dtype, device = torch.bfloat16 if has_bf16() else torch.float32, "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.randn(m, k, dtype=dtype, device=device), torch.randn(k, n, dtype=dtype, device=device)
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    a @ b
    finish()
    count, begun = 0, time.monotonic()
    while time.monotonic() - begun < 0.5:
        a @ b
        finish()
        count += 1
    return 2e-9 * m * k * n * count / (time.monotonic() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["sft", "dpo", "reward"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--gains", action="store_true", help="ours with each gain taken away, instead of the others")
    arguments = parser.parse_args()
    task = arguments.task
    work = Path(tempfile.mkdtemp(prefix="posttrain-bench-"))
    rows = make_rows(task, work / "data", arguments.steps)
    tokens = count_tokens(rows)
    launched = {**environment(CPU), "HF_HUB_OFFLINE": "1"}
    plain = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    out = work / "out"
    if arguments.gains:
        contestants = {
            "ours": (ours(task, rows, out), launched),
            "- one thread, accelerate's default": (ours(task, rows, out), {**launched, "OMP_NUM_THREADS": "1"}),
            "- gradient checkpointing on": (ours(task, rows, out, gradient_checkpointing="true"), launched),
            "- rows not sorted by length": (ours(task, rows, out, train_sampling_strategy="random"), launched),
            "- key-value heads copied": (ours(task, rows, out), {**launched, "TRANSFORMERS_SDPA_FORCE_GQA": "0"}),
        }
        if has_bf16():
            contestants["- fp32 instead of bf16"] = (ours(task, rows, out, bf16="false"), launched)
        else:  # under autocast PEFT's own computes anyway
            contestants["- PEFT's own LoRA layer"] = (without("lora", ours(task, rows, out)), launched)
        if task != "reward":
            contestants["- TRL's own head"] = (without("head", ours(task, rows, out)), launched)
    else:
        contestants = {
            "ours": (ours(task, rows, out), launched),
            f"trl {task}": (trl_cli(task, rows, out), plain),
            "bare trainer": (bare(task, rows, out), plain),
        }
    large, shaped = matmul_gflops(2048, 2048, 2048), matmul_gflops(ROWS_PER_STEP * 64, 576, 1536)
    precision = "bf16" if has_bf16() else "fp32"
    print(f"{precision} matrix products: {large:.0f} GFLOP/s large, {shaped:.0f} at the model's shapes")
    print(f"{task}: {arguments.steps} steps of {ROWS_PER_STEP} rows, {tokens / arguments.steps:.0f} tokens per step\n")
    results: dict[str, list[Result]] = {name: [] for name in contestants}
    for number in range(arguments.rounds):
        for name, (command, env) in contestants.items():
            results[name].append(measure(command, out, env, tokens))
            r = results[name][-1]
            print(f"round {number + 1}  {name:<36} {r.tokens_per_s:7.1f} tokens/s", flush=True)
    print(f"\n{'':<36} {'tokens/s':>9} {'ratio':>6} {'of peak':>8} {'first step':>11} {'peak memory':>12} {'loss':>6}")
    first = results["ours"]
    for name, found in results.items():
        rate = statistics.median(r.tokens_per_s for r in found)
        ratio = statistics.median(o.tokens_per_s / r.tokens_per_s for o, r in zip(first, found, strict=True))
        share = rate * FLOP_A_WEIGHT[task] * TRUNK_WEIGHTS / 1e9 / large
        start = statistics.median(r.first_step_s for r in found)
        peak = statistics.median(r.peak_rss_bytes for r in found) / 2**30
        loss = statistics.median(r.loss for r in found)
        print(f"{name:<36} {rate:9.1f} {ratio:6.2f} {share:8.0%} {start:9.1f} s {peak:8.2f} GiB {loss:6.3f}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
