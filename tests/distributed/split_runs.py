"""The runs of test_hybrid.py: `split_runs.py OUT` trains each cell split, and once on one process.

Importing trl costs more than a cell. So one process imports it, and is forked: once for the runs on one process, once
for each world of 2, 4 and 8. What a run did goes to OUT/NAME.pt.
"""

import dataclasses
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

STEPS, SAVED = 6, 3
SHAPES = {  # of the tiny models: three layers, so that two stages are unequal
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "untied": {"model_type": "llama", "tie_word_embeddings": False, "vocab_size": 325},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False},
}
MANY_LOSSES = {
    "loss_type": [
        "sigmoid", "sft", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero",
        "apo_down", "discopop", "sigmoid_norm",
    ],
    "loss_weights": [1.0, 0.7, 0.3, 1e-3, 0.2, 0.2, 0.1, 0.1, 1e-3, 0.3, 0.1, 0.2, 0.4],
    "label_smoothing": 0.1, "ld_alpha": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A training, and its layout (data, pipeline, tensor)."""

    layout: tuple[int, int, int]
    trainer: str = "sft"
    method: str = "lora"  # lora | rslora | full | continue, dropping (LoRAs that an earlier stage made)
    model: str = "tied"
    schedule: str = "1f1b"
    count: int = 2
    options: dict[str, Any] = field(default_factory=dict)  # of the trainer
    rows: int = 40  # five batches per epoch

    @property
    def world(self) -> int:
        return self.layout[0] * self.layout[1] * self.layout[2]

    @property
    def same(self) -> str:
        """The name of the run on one process that this one must equal."""
        varied = {**self.options, **({"rows": self.rows} if self.rows != 40 else {})}
        options = "-".join(f"{k}={len(v) if isinstance(v, list) else v}" for k, v in sorted(varied.items()))
        return "_".join(filter(None, ("one", self.trainer, self.method, self.model, options)))

    @property
    def name(self) -> str:
        return f"{'x'.join(map(str, self.layout))}-{self.schedule}{self.count}-{self.same}"


T, P, P4, DT, PT, DP, DPT = (1, 1, 2), (1, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (2, 2, 1), (2, 2, 2)
CELLS = [
    # Tensor
    *(Cell(T, trainer, method, model) for trainer in ("sft", "dpo") for method in ("lora", "full")
      for model in ("tied", "untied")),
    Cell(T, "dpo", "continue"),
    Cell(T, model="qwen2"), Cell(T, method="full", model="qwen2"), Cell(T, model="mistral"),
    Cell(T, options={"gradient_accumulation_steps": 2}), Cell(T, options={"gradient_checkpointing": True}),
    # Pipeline
    *(Cell(P, trainer, method, model, schedule) for trainer in ("sft", "dpo") for method in ("lora", "full")
      for model, schedule in (("tied", "1f1b"), ("untied", "gpipe"))),
    Cell(P, "dpo", "continue", count=4, schedule="gpipe"), Cell(P, "dpo", options=MANY_LOSSES),
    Cell(P, method="rslora"), Cell(P, model="qwen2", count=4), Cell(P, method="full", model="mistral"),
    Cell(P, options={"gradient_accumulation_steps": 2}), Cell(P, options={"gradient_checkpointing": True}, count=4),
    Cell(P, "dpo", options={"gradient_accumulation_steps": 2}),
    # The last batch of an epoch has 6 rows, which four micro-batches do not share evenly: there are two then
    Cell(T, rows=46), Cell(P, rows=46, count=4), Cell(P, "dpo", rows=46, count=4),
    # bf16 weights and autocast, as on a GPU
    *(Cell(layout, options={"bf16": True}) for layout in (T, P)),
    # Hybrid
    Cell(DT), Cell(DT, "dpo", "full"), Cell(DP, method="full"), Cell(DP, "dpo"),
    Cell(PT), Cell(PT, method="full"), Cell(PT, "dpo", "full", "untied", "gpipe"), Cell(PT, "dpo", "continue"),
    Cell(PT, method="full", model="qwen2"), Cell(PT, "dpo", "full", options={"gradient_checkpointing": True}),
    Cell((1, 3, 1), method="full"), Cell((1, 3, 1), method="full", model="untied", schedule="gpipe"),
    Cell(DPT), Cell(DPT, method="full"), Cell(DPT, "dpo"), Cell(DPT, "dpo", "full", "untied"),
]  # fmt: skip
RESUMED = [Cell(T), Cell(P), Cell(PT, method="full"), Cell(DPT)]  # of these, from their own checkpoint and from others'


def chosen(cells: list[Cell]) -> list[Cell]:
    """Those whose name matches the regular expression SPLIT_CELLS, to try a few by hand."""
    return [c for c in cells if re.search(os.environ.get("SPLIT_CELLS", ""), c.name)]


def make_model(folder: Path, kind: str) -> None:
    """A tiny model with random weights and the tokenizer of conftest's."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    config = AutoConfig.for_model(**{
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "attention_bias": False, **SHAPES[kind],
    })  # fmt: skip
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # Qwen2's, which begin at 0
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder / kind)
    tokenizer.save_pretrained(folder / kind)


def rows(trainer: str, count: int) -> Any:
    from datasets import Dataset

    def row(i: int) -> dict[str, str]:
        prompt = f"{i} and {i + 1} " + "explain " * (1 + i % 3)
        good, bad = f"are {2 * i + 1} " + "because " * (1 + i % 4), f"is {3 * i} " + "weird " * (2 + i % 2)
        return {"prompt": prompt, **({"completion": good} if trainer == "sft" else {"chosen": good, "rejected": bad})}

    return Dataset.from_list([row(i) for i in range(count)])


def build(cell: Cell, folder: Path, out: Path, layout: Any) -> Any:
    """A trainer of a cell; with `layout` None, of the same training on one process."""
    import torch
    import trl
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from posttrain.adapters import copied_reference
    from posttrain.distributed.split.trainer import split
    from posttrain.models.precision import decide

    settings = {
        "output_dir": str(out), "max_steps": STEPS, "learning_rate": 2e-3, "lr_scheduler_type": "linear",
        "warmup_steps": 2, "weight_decay": 0.01, "logging_steps": 1, "report_to": [], "disable_tqdm": True, "seed": 0,
        "max_length": 64, "gradient_checkpointing": False, "save_strategy": "steps", "save_steps": SAVED,
        "per_device_train_batch_size": 8 // (layout.data if layout else 1), "dataloader_pin_memory": False,
        "max_grad_norm": 0.05, **cell.options,
    }  # fmt: skip
    settings = {**decide(settings), "bf16": bool(cell.options.get("bf16"))}
    trainer_class, config_class = {
        "sft": (trl.SFTTrainer, trl.SFTConfig), "dpo": (trl.DPOTrainer, trl.DPOConfig)
    }[cell.trainer]  # fmt: skip
    dtype = torch.bfloat16 if settings["bf16"] else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / cell.model, dtype=dtype)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = {"lora": LoraConfig(**lora), "rslora": LoraConfig(**lora, use_rslora=True)}.get(cell.method)
    if cell.method in ("continue", "dropping"):
        model = PeftModel.from_pretrained(model, folder / cell.method, is_trainable=True)
    set_seed(7)
    with copied_reference(model):
        return split(trainer_class, layout)(
            model, args=config_class(**settings), train_dataset=rows(cell.trainer, cell.rows), peft_config=config,
            processing_class=AutoTokenizer.from_pretrained(folder / cell.model),
        )  # fmt: skip


def fresh_state() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()


def run(cell: Cell, folder: Path, name: str, layout: Any, resume: Path | None = None) -> None:
    """Train a cell, and write what happened to `name`.pt; the checkpoint and the result stay in a folder `name`."""
    import torch
    from peft import get_peft_model_state_dict
    from transformers import TrainerCallback

    from posttrain.distributed.split.tensor import local
    from posttrain.training.gates import probe_logprobs

    fresh_state()
    trainer = build(cell, folder, folder / name, layout)
    held: list[int] = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            held[:] = [sum(local(p).numel() for p in model.parameters())]

    trainer.add_callback(Count())
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    model = trainer.model
    is_adapter = hasattr(model, "peft_config")
    state = get_peft_model_state_dict(model) if is_adapter else model.state_dict()
    everything = {k: v.detach().clone() for k, v in model.state_dict().items()}
    result = {
        "log": [{k: v for k, v in r.items() if not k.startswith("train_")} for r in trainer.state.log_history[:-1]],
        "state": {k: v.detach().clone() for k, v in state.items()},
        "held": held[0],
        "parameters": sum(p.numel() for p in model.parameters()),
        "wrapper": type(trainer.model_wrapped).__name__,
        "probe": probe_logprobs(model, list(range(5, 40))),
        "trainer": type(trainer).__name__,
    }
    if layout is not None:
        gathered: list[Any] = [None] * cell.world
        torch.distributed.all_gather_object(gathered, (everything, result["held"]))
        result["held"] = [count for _, count in gathered]
        result["apart"] = max(
            (other[k] - everything[k]).abs().max().item() for other, _ in gathered for k in everything
        )
    if int(os.environ.get("RANK", "0")) == 0:
        model.save_pretrained(folder / name / "result")
        torch.save(result, folder / f"{name}.pt")


def work(rank: int, world: int, folder: Path, port: int) -> None:
    """One process of a world: all of its cells."""
    import torch.distributed as dist

    from posttrain.distributed.split.layout import Layout
    from posttrain.models.cpu.lm_head import use_dense_lm_head
    from posttrain.models.cpu.lora import use_accumulated_lora

    use_dense_lm_head()
    use_accumulated_lora()
    cells = chosen(CELLS)
    if world == 1:
        for cell in {c.same: c for c in cells}.values():
            run(cell, folder, cell.same, None)
        return
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    dist.init_process_group("gloo")

    def go(cell: Cell, name: str, resume: Path | None = None) -> None:
        layout = Layout(*cell.layout, schedule=cell.schedule, micro_batches=cell.count)
        run(cell, folder, name, layout, resume)

    for cell in cells:
        if cell.world == world:
            go(cell, cell.name)
            if cell == Cell(P):
                refuse_dropout(cell, folder)
            if cell in RESUMED:
                go(cell, f"{cell.name}-resumed", folder / cell.name / f"checkpoint-{SAVED}")
                go(cell, f"{cell.name}-from-one", folder / cell.same / f"checkpoint-{SAVED}")
    dist.destroy_process_group()


def refuse_dropout(cell: Cell, folder: Path) -> None:
    """A continued adapter may have dropout, although the stage's configuration does not."""
    from posttrain.distributed.split.layout import Layout
    from posttrain.errors import ConfigError

    fresh_state()
    layout = Layout(*cell.layout, schedule=cell.schedule, micro_batches=cell.count)
    with pytest.raises(ConfigError, match=r"has dropout 0\.1"):
        build(dataclasses.replace(cell, method="dropping"), folder, folder / "dropped", layout)


def resume_on_one(rank: int, folder: Path) -> None:
    """One process resumes and finishes a split run."""
    from posttrain.models.cpu.lm_head import use_dense_lm_head
    from posttrain.models.cpu.lora import use_accumulated_lora

    use_dense_lm_head()
    use_accumulated_lora()
    for cell in chosen(RESUMED):
        run(cell, folder, f"{cell.name}-to-one", None, folder / cell.name / f"checkpoint-{SAVED}")


def make_adapters(folder: Path) -> None:
    """LoRAs that an earlier stage has trained, without dropout and with it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for name, dropout in (("continue", 0.0), ("dropping", 0.1)):
        torch.manual_seed(2)
        lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        base = AutoModelForCausalLM.from_pretrained(folder / "tied")
        model = get_peft_model(base, LoraConfig(**lora, lora_dropout=dropout))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder / name)


def main(folder: Path) -> None:
    import socket

    import torch.multiprocessing as mp
    import trl  # noqa: F401

    import posttrain.distributed.split.trainer  # noqa: F401

    for kind in SHAPES:
        make_model(folder, kind)
    make_adapters(folder)
    for world in (1, 2, 4, 3, 8):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.start_processes(work, (world, folder, port), nprocs=world, start_method="fork")
    mp.start_processes(resume_on_one, (folder,), nprocs=1, start_method="fork")


if __name__ == "__main__":
    assert all(dataclasses.is_dataclass(c) for c in CELLS)
    main(Path(sys.argv[1]))
