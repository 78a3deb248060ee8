"""The demo's chain with several seeds: does each stage improve the policy, and by how much?

    python benchmarks/seeds.py                       # seeds 1 2 3, each the whole chain
    python benchmarks/seeds.py --seeds 4 5 --chain other/chain.yaml
    python benchmarks/seeds.py --ner                 # the tagger's chain, LoRA against full fine-tuning, five seeds

Runs go to runs/seeds/; those that are complete are not run again. The interval of one seed is over paired test rows.
The last line of a block is over the seeds: their mean, and Student's 95% interval.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import yaml

from posttrain.chain.graph import Chain, read_chain
from posttrain.chain.run import run
from posttrain.cli import FULL_DEMO_CHAIN
from posttrain.demo import spelling as demo
from posttrain.intervals import percent
from posttrain.launch import ROOT
from posttrain.runs.headline import headline
from posttrain.runs.lineage import Lineage, read_lineage

RUNS = Path("runs/seeds")
NER_CHAIN = ROOT / "recipes" / "configs" / "minilm" / "chain.yaml"
# The rate in full is that of peft_methods.py; the steps are the same.
NER_WAYS = {"LoRA": {}, "in full": {"adapter": {"method": "none"}, "learning_rate": 1e-4}}
STUDENT_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def seeded(path: Path, seed: int, way: str = "", **overrides: Any) -> Chain:
    """The chain at `path` with every stage's seed changed, and more by `overrides`, in a directory of its own."""
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    name = f"{document['name']}{way and '-' + way.replace(' ', '-')}-seed{seed}"
    document |= {"name": name, "output_dir": str(RUNS / name)}
    for stage in document["stages"].values():
        stage["config"] = str((path.parent / stage["config"]).resolve())
        stage["overrides"] = {**stage.get("overrides", {}), "seed": seed, **overrides}
    RUNS.mkdir(parents=True, exist_ok=True)
    written = RUNS / f"{name}.yaml"
    written.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return read_chain(written)


def student(values: list[float]) -> tuple[float, float]:
    """Mean and half of Student's 95% interval; one value has no interval."""
    if len(values) < 2:
        return values[0], float("nan")
    half = STUDENT_975[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), half


def over_seeds(values: list[float]) -> str:
    mean, half = student(values)
    return f"{mean:+.1%} [{100 * (mean - half):+.1f}, {100 * (mean + half):+.1f}]"


def report(stage: str, by_seed: dict[int, Lineage]) -> None:
    """Print each seed's headline numbers for each stage, and the mean change over the seeds."""
    measured = {seed: {m.name: m for m in headline(lineage)} for seed, lineage in by_seed.items()}
    for name in next(iter(measured.values())):
        print(f"\n{stage}, {name}")
        for seed, measures in measured.items():
            m = measures[name]
            print(f"  seed {seed:<3} {percent(m.before):>22} -> {m.value:<22} {percent(m.change, '+')}")
        changes = [m[name].change for m in measured.values()]
        if all(changes):
            print(f"  over the seeds: {over_seeds([change.mean for change in changes])}")


def compare_tagger(seeds: list[int]) -> None:
    """Run the tagger with LoRA and in full with every seed, and print entity F1 and its paired difference."""
    demo.prepare(ner=True)
    found: dict[str, list[Lineage]] = {way: [] for way in NER_WAYS}
    for seed in seeds:
        for way, overrides in NER_WAYS.items():
            chain = seeded(NER_CHAIN, seed, way, **overrides)
            run(chain)
            found[way].append(read_lineage(chain.run_dir("ner")))
    for way, runs in found.items():
        cost = runs[0].cost
        share = cost["trained_parameters"] / cost["parameters"]
        memory = statistics.median(r.cost["peak_rss_bytes"] for r in runs) / 2**30
        wall = statistics.median(r.cost["wall_s"] for r in runs)
        f1 = ", ".join(f"{r.metrics['f1']:.1%}" for r in runs)
        print(f"{way + ',':<8} {share:.2%} of the parameters: F1 {f1}; {memory:.2f} GiB, {wall:.0f} s")
    apart = [a.metrics["f1"] - b.metrics["f1"] for a, b in zip(*found.values(), strict=True)]
    print(f"LoRA less full, seed by seed: {over_seeds(apart)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chain", type=Path, default=ROOT / FULL_DEMO_CHAIN)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--ner", action="store_true", help="the tagger's chain instead, in two ways")
    arguments = parser.parse_args()
    if arguments.ner:
        compare_tagger(arguments.seeds or [1, 2, 3, 4, 42])
        return
    demo.prepare()
    chains = {seed: seeded(arguments.chain, seed) for seed in arguments.seeds or [1, 2, 3]}
    for chain in chains.values():
        run(chain)
    for stage in next(iter(chains.values())).stages:
        report(stage.name, {seed: read_lineage(chain.run_dir(stage.name)) for seed, chain in chains.items()})


if __name__ == "__main__":
    main()
