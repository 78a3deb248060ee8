"""Chains whose run directories are written by the package's own writers, without training."""

import json
import math
import random
from pathlib import Path

from posttrain.chain.graph import read_chain
from posttrain.chain.run import take_chain_directory
from posttrain.runs.answers import Answer, change, exact_match, write_answers
from posttrain.runs.lineage import Lineage, hash_files, parent_record, write_lineage
from posttrain.runs.paths import COMPLETIONS, METRICS
from posttrain.runs.record import append

CHAIN = """name: {name}
output_dir: {folder}/runs
stages:
  sft:    {{recipe: sft,    config: sft.yaml}}
  sample: {{recipe: sample, config: sample.yaml, inputs: {{policy: sft}}}}
  reward: {{recipe: reward, config: reward.yaml, inputs: {{policy: sft, data: sample}}}}
  dpo:    {{recipe: dpo,    config: dpo.yaml,    inputs: {{policy: sft, data: sample}}}}
  ppo:    {{recipe: ppo,    config: ppo.yaml,    inputs: {{policy: sft, reward: reward}}}}
launch: {{accelerate_config: cpu.yaml}}
"""
CONFIGS = {
    "sft": "model_name_or_path: base\ntrain_file: train.jsonl\ntest_file: test.jsonl\nlearning_rate: 0.001\n",
    "sample": "train_file: sample.jsonl\nverifier: exact_match\n",
    "reward": "learning_rate: 0.0001\n",
    "dpo": "test_file: test.jsonl\nbeta: 0.1\n",
    "ppo": "train_file: train.jsonl\ntest_file: test.jsonl\nkl_coef: 0.05\n",
}
WORDS = ("receive", "believe", "achieve", "friend", "their", "weird", "separate", "definite", "tomorrow", "because")
POLICIES = ("sft", "dpo", "ppo")
HEALTH = {"name": "kl runaway", "step": 40, "value": 9.5, "limit": 4.0, "advice": "Raise kl_coef."}


def write_chain(folder: Path, *, name="planted", extra=None):
    """Write the chain's files only; `extra`: stage -> more lines of its configuration."""
    (folder / "chain.yaml").write_text(CHAIN.format(name=name, folder=folder))
    for stage, text in CONFIGS.items():
        (folder / f"{stage}.yaml").write_text(text + (extra or {}).get(stage, ""))
    return read_chain(folder / "chain.yaml")


def logs(recipe: str, step: int, steps: int, rng: random.Random) -> dict[str, float]:
    """The log of a trainer of this recipe at one step."""
    done = step / steps
    falling, noise = 3 * math.exp(-4 * done) + 0.5, rng.gauss(0, 0.05)
    if recipe == "sft":
        return {"loss": falling + noise, "grad_norm": 1 + abs(noise), "mean_token_accuracy": 0.4 + 0.5 * done,
                "entropy": 2 - done + noise, "learning_rate": 1e-3 * (1 - done), "num_tokens": 64.0 * step}  # fmt: skip
    if recipe == "reward":
        return {"loss": 0.7 - 0.4 * done + noise, "accuracy": 0.5 + 0.4 * done, "margin": 2 * done + noise,
                "min_reward": -1 - done, "mean_reward": noise, "max_reward": 1 + done, "grad_norm": 1.0}  # fmt: skip
    if recipe == "dpo":
        return {"loss": 0.69 - 0.3 * done + noise, "rewards/chosen": done, "rewards/rejected": -2 * done,
                "rewards/margins": 3 * done + noise, "rewards/accuracies": 0.5 + 0.4 * done, "logps/chosen": -20 - done,
                "logps/rejected": -25 - 9 * done, "grad_norm": 2.0}  # fmt: skip
    return {"objective/scores": 2 * done + noise, "objective/kl": 5 * done, "objective/entropy": 2 - done,
            "objective/scores_std": 1.0, "completions/mean_length": 6.0, "completions/stopped": 0.9 + 0.1 * done,
            "value/explained_variance": done - 0.2, "loss/policy": noise, "loss/value": falling,
            "policy/clip_fraction": 0.1 * abs(noise), "rewards/reward": 2 * done, "time/generation": 1.0}  # fmt: skip


def write_logs(run_dir: Path, recipe: str, *, steps: int, until: int | None = None, seed: int = 0) -> None:
    """Write metrics.jsonl, and completions.jsonl for PPO, up to a step."""
    rng = random.Random(seed)
    for step in range(1, (until or steps) + 1):
        record = {"step": step, "max_steps": steps, "epoch": step / steps, "time": 0.0, "left_s": 0.0}
        append(run_dir / METRICS, record | logs(recipe, step, steps, rng))
        if recipe == "ppo":
            row = {
                "step": step,
                "prompt": "teh",
                "completion": "the",
                "score": rng.gauss(2 * step / steps, 1),
                "kl": 0.1,
            }
            append(run_dir / COMPLETIONS, row)


def answers_of(right: float, *, seed: int, rows: int = 40, prompt=str) -> list[Answer]:
    """Answers to the same rows, about a given share of them right."""
    rng = random.Random(seed)
    found = []
    for n in range(rows):
        word = f"{WORDS[n % len(WORDS)]}{n}"
        greedy = word if rng.random() < right else word[::-1]
        sampled = [word if rng.random() < right else "" for _ in range(2)]
        found.append(Answer([{"role": "user", "content": prompt(word[1:])}], word, greedy, rng.random() < 0.9, sampled))
    return found


def write_stage(chain, name: str, *, steps: int = 60, metrics=None, prompt=str) -> Path:
    """Write a complete stage, on its parents' results as they are."""
    stage = next(s for s in chain.stages if s.name == name)
    run_dir, recipe = chain.run_dir(name), stage.config.recipe
    kind = "data" if recipe == "sample" else "adapter"
    (run_dir / kind).mkdir(parents=True)
    (run_dir / kind / "weights").write_text(name)
    (run_dir / "stage.json").write_text(json.dumps({"key": name * 4, "recipe": recipe}))
    measured: dict = {"stops": 0.95}
    if recipe == "sample":
        measured = {"prompts": 100, "completions": 400, "mean_score": 0.4, "stopped": 0.9, "pairs": 42}
    else:
        write_logs(run_dir, recipe, steps=steps)
    if recipe == "reward":
        measured = {"held_out_accuracy": 0.8, "held_out_pairs": 50}
    if recipe in POLICIES:
        right = {"base": 0.0, "sft": 0.5, "dpo": 0.7, "ppo": 0.6}
        before = answers_of(right["base" if recipe == "sft" else "sft"], seed=1, prompt=prompt)
        after = answers_of(right[recipe], seed=1, prompt=prompt)
        (run_dir / "answers").mkdir()
        for when, answers in (("before", before), ("after", after)):
            write_answers(run_dir / "answers" / f"{when}.jsonl", answers)
            measured[when] = exact_match(answers)
        measured["change"] = change(before, after)
    if recipe == "ppo":
        measured |= {"objective/kl": 5.0, "health": [HEALTH]}
    lineage = Lineage(
        stage=name, recipe=recipe, kind=kind, key=f"{sum(map(ord, name)):064x}", config=stage.config.to_dict(),
        task={"reward": "SEQ_CLS", "sample": None}.get(recipe, "CAUSAL_LM"),
        parents={role: parent_record(run_dir, chain.run_dir(parent)) for role, parent in stage.parents.items()},
        base={} if recipe == "sample" else {"name": "org/base", "fingerprint": "ab" * 32, "pad_token_id": 0},
        data={"train": {"rows": 100, "format": "prompt_completion", "fingerprint": "cd" * 32}},
        versions={"torch": "2.13.0", "trl": "1.16.0"}, git_commit="c0ffee" + "0" * 34, seed=42,
        metrics=measured | (metrics or {}), gates=[],
        cost={"wall_s": 12.5, "peak_rss_bytes": 2**30, "trained_parameters": 100, "parameters": 1000},
    )  # fmt: skip
    (run_dir / "gates.json").write_text(
        json.dumps([{"name": "reload", "passed": True, "value": 0.0, "accepted": "at most 0.001", "advice": ""}])
    )
    lineage.files = hash_files(run_dir, kind)
    write_lineage(run_dir, lineage)
    return run_dir


def plant(folder: Path, *, stages=("sft", "sample", "reward", "dpo", "ppo"), steps: int = 60, prompt=str, **options):
    """A chain with these stages complete."""
    chain = write_chain(folder, **options)
    take_chain_directory(chain)
    for name in stages:
        write_stage(chain, name, steps=steps, prompt=prompt)
    return chain


def write_ner(folder: Path, words, gold, found, entity_scores, mistakes):
    """A chain of one tagger, complete, whose answers are these tags."""
    text = "name: names\noutput_dir: {0}/runs\nstages:\n  ner: {{recipe: ner, config: ner.yaml}}\n"
    (folder / "chain.yaml").write_text(text.format(folder))
    (folder / "ner.yaml").write_text("model_name_or_path: base\ntrain_file: a.conll\ntest_file: b.conll\n")
    chain = read_chain(folder / "chain.yaml")
    take_chain_directory(chain)
    run_dir = chain.run_dir("ner")
    for part in ("adapter", "answers"):
        (run_dir / part).mkdir(parents=True)
    scores = entity_scores(gold, found)
    worst = mistakes(words, gold, found, [f"b.conll, line {n}" for n in range(len(words))])
    rows = [{"tokens": w, "tags": g, "found": f} for w, g, f in zip(words, gold, found, strict=True)]
    (run_dir / "answers" / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (run_dir / "answers" / "test.json").write_text(json.dumps({"scores": scores, "mistakes": [vars(m) for m in worst]}))
    for step in range(1, 30):
        about = {"step": step, "max_steps": 29}
        append(run_dir / METRICS, about | {"loss": 2.0 / step, "grad_norm": 1.0})
        append(run_dir / METRICS, about | {"eval_f1": step / 30, "eval_f1_PER": step / 40, "eval_loss": 1.0})
    micro = scores["micro"]
    lineage = Lineage(
        stage="ner", recipe="ner", kind="adapter", key="e" * 64, task="TOKEN_CLS",
        config=chain.stages[0].config.to_dict(),
        base={"name": "org/bert", "fingerprint": "ab" * 32, "pad_token_id": 0}, versions={"torch": "2.13.0"},
        data={"test": {"rows": len(words), "format": "bio", "fingerprint": "cd" * 32}},
        metrics={k: micro[k] for k in ("precision", "recall", "f1")}
        | {"sentences": len(words), "measured_on": "test", "labels": ["O", "B-PER"]},
        cost={"wall_s": 3.0, "peak_rss_bytes": 2**29, "trained_parameters": 10, "parameters": 100},
    )  # fmt: skip
    lineage.files = hash_files(run_dir, "adapter")
    write_lineage(run_dir, lineage)
    return chain
