"""Every PEFT method on two tasks: trained parameters, quality, time and memory. And LoRA by rank and by target.

    python benchmarks/peft_methods.py                      # all of it, into benchmarks/results/peft.md and peft.png
    python benchmarks/peft_methods.py --only sft/lora      # some of it; runs that are complete are not run again
    python benchmarks/peft_methods.py --report             # no runs: the tables and the plot from what is there

sft: SmolLM2-135M corrects typos after 640 of them (20 steps of 32); greedy exact match on 300 held-out words.
ner: MiniLM finds names in the demo's synthetic sentences (600 of them, 3 epochs); entity F1 on 500. LoRA against full
fine-tuning from several seeds, and for 6 epochs as the demo has them: benchmarks/seeds.py --ner.

One learning rate per method, set below: on ner the best of two or three by validation F1 if the first was low, on sft
as usual in the papers, without a search. A method that is low here may do better with another. Memory is the process's
peak, evaluation included; seconds per step are from the first log to the last. Runs go to runs/peft/. (This file is not
named peft.py, which would hide the package PEFT.)
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.config.peft_methods import METHODS
from posttrain.demo import spelling as demo
from posttrain.launch import ROOT
from posttrain.runs.lineage import is_complete, read_lineage

RUNS = ROOT / "runs" / "peft"
RESULTS = ROOT / "benchmarks" / "results"
QUALITY = {"sft": "exact match", "ner": "entity F1"}
RANKS = (1, 2, 4, 8, 16, 32, 64)
TARGETS = {
    "sft": {
        "query, value": "q_proj,v_proj",
        "attention": "q_proj,k_proj,v_proj,o_proj",
        "feed-forward": "gate_proj,up_proj,down_proj",
    },
    "ner": {
        "query, value": "query,value",
        "attention": "query,key,value,attention.output.dense",
        "feed-forward": "intermediate.dense," + ",".join(f"{i}.output.dense" for i in range(6)),
    },
}
TASKS: dict[str, list[str]] = {
    "sft": [
        "--config", "recipes/configs/smollm2-135m/sft.yaml", "--max_train_rows", "640", "--test_rows", "300",
        "--test_samples", "0", "--generation_batch_size", "64", "--gates.stops", "0", "--logging_steps", "1",
    ],
    "ner": ["--config", "recipes/configs/minilm/ner.yaml", "--num_train_epochs", "3", "--logging_steps", "10"],
}  # fmt: skip
LEARNING_RATES = {
    "sft": dict.fromkeys(METHODS, 1.5e-3) | {
        "pissa": 5e-4, "olora": 5e-4, "adalora": 5e-3, "ia3": 1e-2, "vera": 3e-2, "lokr": 3e-3, "ln_tuning": 1e-2,
        "loha": 5e-3, "prompt_tuning": 3e-2, "p_tuning": 1e-3, "prefix_tuning": 1e-3, "p_tuning_v2": 5e-3, "none": 1e-4,
    },
    "ner": dict.fromkeys(METHODS, 1e-3) | {
        "pissa": 5e-4, "olora": 5e-4, "adalora": 5e-3, "ia3": 1e-2, "vera": 3e-2, "lokr": 1e-2, "ln_tuning": 1e-2,
        "loha": 1e-2, "bottleneck": 3e-3, "prompt_tuning": 3e-2, "p_tuning": 1e-2, "prefix_tuning": 1e-3,
        "p_tuning_v2": 3e-2, "none": 1e-4,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training run: `name` is its folder and its row."""

    task: str
    name: str
    method: str
    arguments: tuple[str, ...] = field(default=())

    @property
    def folder(self) -> Path:
        return RUNS / self.task / self.name


def all_runs() -> list[Run]:
    runs = []
    for task in TASKS:
        runs += [Run(task, method, method) for method in METHODS]
        runs += [lora_of_rank(task, r) for r in RANKS if r != 16]
        runs += [
            Run(task, as_name(name), "lora", ("--adapter.target_modules", modules))
            for name, modules in TARGETS[task].items()
        ]
    return runs


def lora_of_rank(task: str, r: int) -> Run:
    return Run(task, f"lora-r{r}", "lora", ("--adapter.r", str(r), "--adapter.alpha", str(2 * r)))


def as_name(target: str) -> str:
    return f"lora-{target.replace(', ', '-')}"


def train(run: Run) -> None:
    """Run the recipe in a process of its own, with its output in runs/peft/."""
    command = [
        sys.executable, str(ROOT / "recipes" / f"{run.task}.py"), *TASKS[run.task], "--adapter.method", run.method,
        "--learning_rate", str(LEARNING_RATES[run.task][run.method]), *run.arguments, "--output_dir", str(run.folder),
    ]  # fmt: skip
    log = RUNS / f"{run.task}-{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ})
    print(f"{run.task}/{run.name}: {'done' if done.returncode == 0 else f'failed, see {log}'}", flush=True)


def figures(run: Run) -> dict[str, Any] | None:
    """What a complete run shows, or None."""
    if not is_complete(run.folder):
        return None
    lineage = read_lineage(run.folder)
    logs = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in logs if "train/loss" in r]
    weights = [p for p in (run.folder / lineage.kind).glob("*.safetensors")]
    m = lineage.metrics
    quality = m["after"]["greedy_exact"] if run.task == "sft" else m["f1"]
    return {
        "trained": lineage.cost["trained_parameters"],
        "share": lineage.cost["trained_parameters"] / lineage.cost["parameters"],
        "quality": quality,
        "interval": (m["after"]["greedy_exact_low"], m["after"]["greedy_exact_high"]) if run.task == "sft" else None,
        "memory_gib": lineage.cost.get("peak_gpu_bytes", lineage.cost["peak_rss_bytes"]) / 2**30,
        "step_s": (steps[-1]["time"] - steps[0]["time"]) / (steps[-1]["step"] - steps[0]["step"]),
        "file_mb": sum(p.stat().st_size for p in weights) / 1e6,
        "learning_rate": float(lineage.config["learning_rate"]),
    }


def table(runs: list[Run], title: str, quality: str) -> list[str]:
    lines = [
        f"### {title}", "",
        f"| | trained | share | {quality} | peak memory | s a step | file | merges | learning rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for run in runs:
        f = figures(run)
        if f is None:
            lines.append(f"| {run.name} | not run | | | | | | | |")
            continue
        interval = f" [{f['interval'][0]:.1%}, {f['interval'][1]:.1%}]" if f["interval"] else ""
        cells = (
            run.name,
            f"{f['trained']:,}",
            f"{f['share']:.2%}",
            f"{f['quality']:.1%}{interval}",
            f"{f['memory_gib']:.2f} GiB",
            f"{f['step_s']:.2f}",
            f"{f['file_mb']:.1f} MB",
            "yes" if METHODS[run.method].mergeable else "no",
            f"{f['learning_rate']:g}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def report(runs: list[Run]) -> None:
    """Write the tables and the plot. A task that has no run here keeps what stands, with its date and machine."""
    RESULTS.mkdir(exist_ok=True)
    text = [
        "# PEFT methods, measured", "",
        "Regenerated by `python benchmarks/peft_methods.py`; what is measured, and how, is said at the top of that "
        "file. One run each, one learning rate each.", "",
        "![trained parameters against quality](peft.png)", "",
    ]  # fmt: skip
    for task, word in QUALITY.items():
        mine = {r.name: r for r in runs if r.task == task}
        if not any(is_complete(run.folder) for run in mine.values()):
            text += standing(task)
            continue
        ranks = [mine["lora" if r == 16 else f"lora-r{r}"] for r in RANKS]
        targets = [mine[as_name(target)] for target in TARGETS[task]]
        text += [f"## {task}", "", f"{datetime.date.today()}, {machine()}.", ""]
        text += table([mine[method] for method in METHODS], "Methods", word)
        text += table(ranks, "LoRA by rank (alpha is twice the rank; `lora` is 16)", word)
        text += table([*targets, mine["lora"]], "LoRA by target (`lora` is every linear layer)", word)
    (RESULTS / "peft.md").write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
    plot({task: read_tables(text, task) for task in QUALITY})
    print("\n".join(text))


def standing(task: str) -> list[str]:
    """A task's section of the result that is checked in."""
    lines = (RESULTS / "peft.md").read_text(encoding="utf-8").splitlines()
    first = lines.index(f"## {task}")
    later = [n for n, line in enumerate(lines) if n > first and line.startswith("## ")]
    return [*lines[first : later[0] if later else None], ""]


def read_tables(text: list[str], task: str) -> dict[str, tuple[int, float]]:
    """(trained parameters, quality in percent) of each row of a task's tables."""
    found, inside = {}, False
    for line in text:
        inside = line == f"## {task}" if line.startswith("## ") else inside
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if inside and len(cells) > 3 and cells[1].replace(",", "").isdecimal():
            found[cells[0]] = int(cells[1].replace(",", "")), float(cells[3].partition("%")[0])
    return found


def machine() -> str:
    """The processor, its bf16, and the threads that a run had."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next(line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name"))
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    return f"{model} {'with' if 'avx512_bf16' in cpu else 'without'} AVX512-BF16, {threads} thread(s)"


def plot(found: dict[str, dict[str, tuple[int, float]]]) -> None:
    """Plot trained parameters against quality, one panel per task, with a line through LoRA's ranks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(QUALITY), figsize=(13, 5.5))
    for axis, (task, word) in zip(axes, QUALITY.items(), strict=True):
        mine = found[task]
        for name in (m for m in METHODS if m in mine):
            axis.plot(*mine[name], "s" if METHODS[name].prompt_learning else "o", color="C0")
            axis.annotate(name, mine[name], fontsize=8, xytext=(4, 3), textcoords="offset points")
        ranked = [mine[n] for r in RANKS if (n := "lora" if r == 16 else f"lora-r{r}") in mine]
        axis.plot([at[0] for at in ranked], [at[1] for at in ranked], ":", color="C1", label="LoRA, r = 1 to 64")
        axis.set(xscale="log", xlabel="trained parameters", ylabel=f"{word}, %", title=task)
        axis.legend(loc="lower right", frameon=False)
        axis.grid(alpha=0.3)
    figure.text(0.01, 0.01, "squares: virtual tokens", fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "peft.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="TASK/NAME", help="these runs alone, such as sft/lora ner/none")
    parser.add_argument("--report", action="store_true", help="no runs: tables and plot from what is there")
    arguments = parser.parse_args()
    runs = all_runs()
    if not arguments.report:
        demo.prepare()
        demo.prepare(ner=True)
        for run in runs:
            chosen = arguments.only is None or f"{run.task}/{run.name}" in arguments.only
            if chosen and not is_complete(run.folder):
                train(run)
    report(runs)


if __name__ == "__main__":
    main()
