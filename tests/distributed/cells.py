"""Every strategy x trainer x adapter: how a cell is run as a user runs it, in this process, many in one start.

    accelerate launch --config_file accelerate_configs/ddp.yaml tests/distributed/cells.py FILES OUT

runs all of them on two processes. Most of a launch is imports, so that one start serves every configuration: its
environment is the one that accelerate makes of the configuration's file. `run_one` is the same on one process.
"""

import gc
import json
import os
import shutil
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import ROOT, run_here

CONFIGS = ("ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "fsdp2")
TRAINERS = ("sft", "reward", "dpo", "ppo", "ner")
ADAPTERS = ("lora", "none")
REFUSED = {("fsdp2", "ppo", adapter) for adapter in ADAPTERS}
CELLS = [(c, t, a) for c in CONFIGS for t in TRAINERS for a in ADAPTERS if (c, t, a) not in REFUSED]

WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp2": "FSDP"}  # of the others: DeepSpeedEngine

# Three steps over four rows each, a checkpoint after the second. An epsilon that a rounding error does not reach:
# Adam's first step is otherwise the sign of each gradient, of those too that are zero but for the order of additions.
SETTINGS = {
    "learning_rate": 0.01, "adam_epsilon": 1e-4, "per_device_train_batch_size": 2, "max_steps": 3, "save_steps": 2,
    "logging_steps": 1, "gradient_checkpointing": "false", "bf16": "false", "lr_scheduler_type": "linear",
    "adapter.r": 4, "adapter.alpha": 8,
}  # fmt: skip
OF_TRAINER = {
    "sft": {"max_new_tokens": 4, "gates.stops": 0, "train_file": "train.jsonl"},
    "reward": {"train_file": "pairs.jsonl"},
    "dpo": {"max_new_tokens": 4, "gates.stops": 0, "train_file": "pairs.jsonl"},
    "ppo": {
        "max_new_tokens": 4, "gates.stops": 0, "train_file": "train.jsonl", "verifier": "distributed.cells:vowels",
        "max_completion_length": 6, "num_ppo_epochs": 2, "num_mini_batches": 1,
    },
    "ner": {"train_file": "train.conll", "max_length": 64},  # rows sorted by length, as it is
}  # fmt: skip


def vowels(prompt, completion, row) -> float:
    """PPO's reward, different for each completion, or whitened advantages would be rounding errors."""
    return sum(completion.count(v) * n for n, v in enumerate("aeiou", 1)) + len(completion) / 10


def arguments(trainer: str, adapter: str, files: Path, out: Path, processes: int, **more) -> list[str]:
    """A recipe's command line. One process takes the rows of two, one after the other."""
    settings = SETTINGS | OF_TRAINER[trainer] | more
    settings["train_file"] = files / settings["train_file"]
    settings |= {
        "model_name_or_path": files / ("bert" if trainer == "ner" else "tiny"), "adapter.method": adapter,
        "gradient_accumulation_steps": 2 // processes, "output_dir": out,
    }  # fmt: skip
    if adapter == "none":
        settings = {k: v for k, v in settings.items() if k not in ("adapter.r", "adapter.alpha")}
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


@contextmanager
def launched_as(config: str):
    """This process's environment as `accelerate launch --config_file CONFIG` makes it."""
    from posttrain.launch import accelerate_environment

    with mock.patch.dict(os.environ):
        for key in [k for k in os.environ if k.startswith(("ACCELERATE_", "FSDP_"))]:
            del os.environ[key]
        os.environ.update(accelerate_environment(ROOT / "accelerate_configs" / f"{config}.yaml"))
        yield


@contextmanager
def observed(kept: Path):
    """While a recipe runs: the wrapper that its check saw, and the share of the model that this process holds.

    Checkpoints are copied to `kept` before they go. ZeRO-3 would leave parameters as small as these whole.
    """
    from posttrain.distributed import checks
    from posttrain.log import is_main
    from posttrain.runs.paths import CHECKPOINTS
    from posttrain.training.stage import Stage

    seen: dict = {}
    check, close, train = checks.check_wrapped, Stage.close, Stage.train

    def looking(model, launch, **options):
        check(model, launch, **options)
        parameters = list(model.parameters())
        seen["wrapper"] = type(model).__name__
        seen["held"] = sum(map(held, parameters)) / sum(map(total, parameters))

    def splitting(stage, trainer):
        if stage.launch.strategy == "zero3":
            config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        train(stage, trainer)

    def keeping(stage, **options):
        seen["launch"] = str(stage.launch)
        if is_main() and not kept.exists():
            shutil.copytree(stage.run_dir / CHECKPOINTS, kept)
        close(stage, **options)

    with (
        mock.patch.object(checks, "check_wrapped", looking), mock.patch.object(Stage, "close", keeping),
        mock.patch.object(Stage, "train", splitting),
    ):  # fmt: skip
        yield seen


def held(parameter) -> int:
    """How many numbers of a parameter this process holds between two steps."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.numel()
    return parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel()


def total(parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def run_cell(
    trainer: str, adapter: str, files: Path, out: Path, processes: int, *, barrier=lambda: None, **more
) -> dict:
    """A whole run in OUT/whole, and one that goes on from its checkpoint in OUT/resumed. What was seen of them."""
    kept, resumed = out / "kept", out / "resumed"
    begun = time.monotonic()
    with observed(kept) as seen:
        run_here(trainer, *arguments(trainer, adapter, files, out / "whole", processes, **more))
        barrier()
        half = time.monotonic()
        if int(os.environ.get("RANK", "0")) == 0:
            resumed.mkdir()
            shutil.copytree(kept / "checkpoint-2", resumed / "checkpoints" / "checkpoint-2")
            shutil.copy(out / "whole" / "stage.json", resumed)
        barrier()
        run_here(trainer, *arguments(trainer, adapter, files, resumed, processes, **more))
    return seen | {"seconds": [round(half - begun, 2), round(time.monotonic() - half, 2)]}


def run_all(files: Path, out: Path, cells) -> None:
    """Each cell on the processes of this launch; what was seen, or the error, in OUT/CELL/seen-RANK.json."""
    import torch.distributed as dist

    from posttrain.distributed import rendezvous

    rank = os.environ["RANK"]
    rendezvous.start_process_group(60, on_cpu=True)
    for cell in cells:
        config, trainer, adapter = cell
        folder = out / "-".join(cell)
        folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        try:
            with launched_as(config):
                seen = run_cell(trainer, adapter, files, folder, 2, barrier=dist.barrier)
        except Exception as error:  # noqa: BLE001  the next cell is run all the same
            traceback.print_exc()
            seen = {"error": f"{type(error).__name__}: {error}"}
        (folder / f"seen-{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
        print(f"rank {rank}: {' '.join(cell)}: {seen}", file=sys.stderr, flush=True)
        gc.collect()


if __name__ == "__main__":
    wanted = [tuple(cell.split("-")) for cell in sys.argv[3:]] or CELLS
    run_all(Path(sys.argv[1]), Path(sys.argv[2]), wanted)
