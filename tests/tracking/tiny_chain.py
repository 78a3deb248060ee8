"""A chain of every recipe on tiny models, whose stages run one after the other in one process: `tiny_chain.py FOLDER`

What is run is what `posttrain run` launches, recipe and arguments, less ten seconds of imports a stage.
"""

import runpy
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
SMALL = {
    "per_device_train_batch_size": 4, "gradient_checkpointing": False, "logging_steps": 1, "max_steps": 4,
    "learning_rate": 0.01, "save_steps": 2, "adapter": {"r": 4, "alpha": 8},
}  # fmt: skip
EVALUATED = {"eval_strategy": "steps", "eval_steps": 4}
TESTED = {"test_samples": 1, "max_new_tokens": 4, "gates": {"stops": 0}}
STAGES = {
    "sft": {"recipe": "sft"},
    "reward": {"recipe": "reward", "inputs": {"policy": "sft"}},
    "dpo": {"recipe": "dpo", "inputs": {"policy": "sft"}},
    "ppo": {"recipe": "ppo", "inputs": {"policy": "sft", "reward": "reward"}},
    "sample": {"recipe": "sample", "inputs": {"policy": "sft"}},
    "ner": {"recipe": "ner"},
}


def configs(folder: Path) -> dict[str, dict]:
    rows, pairs, conll = (str(folder / name) for name in ("train.jsonl", "pairs.jsonl", "train.conll"))
    return {
        "sft": {"model_name_or_path": str(folder / "llama"), "train_file": rows, "validation_file": rows,
                "test_file": rows, **EVALUATED, **SMALL, **TESTED},
        "reward": {"train_file": pairs, "validation_file": pairs, **EVALUATED, **SMALL},
        "dpo": {"train_file": pairs, "validation_file": pairs, "test_file": rows, **EVALUATED, **SMALL, **TESTED},
        "ppo": {"train_file": rows, "validation_file": rows, "test_file": rows, **EVALUATED,
                "max_completion_length": 6, "num_ppo_epochs": 1,
                "kl_target": 1e-4, **SMALL, **TESTED},
        "sample": {"train_file": rows, "verifier": "exact_match", "temperature": 2.0, "max_new_tokens": 4},
        "ner": {"model_name_or_path": str(folder / "bert"), "train_file": conll, "validation_file": conll,
                "test_file": conll, "max_length": 64, **SMALL},
    }  # fmt: skip


def prepare(folder: Path, **more: dict) -> Path:
    """Write models, rows, configurations (`more`: additional keys per stage) and the chain; return the chain's file."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import WORDS, make_tiny_bert, make_tiny_model, write_conll, write_jsonl

    make_tiny_model(folder / "llama")
    make_tiny_bert(folder / "bert")
    write_conll(folder / "train.conll")
    write_jsonl(folder / "train.jsonl", [{"prompt": f"{w[1:]} ->", "completion": f" {w}"} for w in WORDS])
    pairs = [{"prompt": f"{w[1:]} ->", "chosen": f" {w}", "rejected": f" {w[::-1]}"} for w in WORDS]
    write_jsonl(folder / "pairs.jsonl", pairs)
    for name, config in configs(folder).items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**config, **more.get(name, {})}))
    stages = {name: {**stage, "config": f"{name}.yaml"} for name, stage in STAGES.items()}
    chain = {"name": "tiny", "output_dir": str(folder / "runs"), "stages": stages}
    (folder / "chain.yaml").write_text(yaml.safe_dump(chain, sort_keys=False))
    return folder / "chain.yaml"


def main(folder: Path) -> None:
    from posttrain.chain.graph import read_chain, stage_arguments
    from posttrain.chain.run import take_chain_directory

    chain = read_chain(folder / "chain.yaml")
    take_chain_directory(chain)
    for stage in chain.stages:
        recipe = ROOT / "recipes" / f"{stage.config.recipe}.py"
        sys.argv = [str(recipe), *stage_arguments(chain, stage)]
        runpy.run_path(str(recipe), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
