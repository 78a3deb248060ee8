"""The time of tracking per step of the demo's SFT: on and off in turn, within one run.

    python benchmarks/tracking.py --steps 24                 # the record and trackio
    python benchmarks/tracking.py --steps 24 --wandb         # and W&B, offline

Same model, rows and settings as the demo's first stage (32 rows per step), but a log at every step instead of every
fifth. Tracking is on at every other step of one run, so that both see the same machine. `of a step` is the time that
the training loop spends in tracking's own code, divided by the time of a step; `on against off` is the median ratio of
neighbouring steps with its interquartile range, and is as noisy as the machine.
Needs the demo's model and data, which `posttrain demo --dry-run` prepares.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from posttrain.config.sections import TrackingSettings
from posttrain.demo.spelling import DATA_DIR, MODEL_DIR
from posttrain.tracking.callback import tracking_callback
from posttrain.tracking.identity import identify
from posttrain.tracking.performance import StepClock
from posttrain.tracking.select import Choice
from posttrain.tracking.tracker import Tracker

EVENTS = (
    "on_train_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_evaluate", "on_save", "on_log",
)  # fmt: skip


class Turns(TrainerCallback):
    """Switches tracking off at every other step, and times the steps and what tracking takes of them."""

    def __init__(self, tracking: Any, clock: StepClock) -> None:
        self.tracking, self.clock = tracking, clock
        self.on, self.begun, self.spent = True, 0.0, 0.0
        self.steps: list[tuple[bool, float, float]] = []  # on, seconds, of them in tracking

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if self.begun:
            self.steps.append((self.on, now - self.begun, self.spent))
            self.on = not self.on
        self.clock.on, self.begun, self.spent = self.on, now, 0.0


def _timed(event: str) -> Any:
    def call(self: Turns, *args: Any, **kwargs: Any) -> None:
        if self.on:
            begun = time.perf_counter()
            getattr(self.tracking, event)(*args, **kwargs)
            self.spent += time.perf_counter() - begun

    return call


for name in EVENTS:
    setattr(Turns, name, _timed(name))


def make_trainer(folder: Path, steps: int) -> Any:
    """The demo's SFT stage, less its gates and its end."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from posttrain.models.cpu.lm_head import use_dense_lm_head
    from posttrain.models.cpu.lora import use_accumulated_lora
    from posttrain.models.precision import decide

    use_dense_lm_head()
    use_accumulated_lora()
    rows = [json.loads(line) for line in (DATA_DIR / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    options = {
        "output_dir": str(folder / "checkpoints"), "per_device_train_batch_size": 32, "max_steps": steps,
        "learning_rate": 1.5e-3, "max_length": 64, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "gradient_checkpointing": False, "disable_tqdm": True, "seed": 0, "bf16": None,
    }  # fmt: skip
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="float32"),
        args=SFTConfig(**decide(options)),
        train_dataset=Dataset.from_list(rows[: 32 * steps]),
        processing_class=AutoTokenizer.from_pretrained(MODEL_DIR),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--wandb", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), options.steps + 3)
        sinks = ("trackio", "wandb") if options.wandb else ("trackio",)
        tracker = Tracker(identify(Path(folder), "0" * 64, "sft"), Choice(sinks, "offline", ""), TrackingSettings())
        clock = StepClock(trainer)
        tracker.start({"performance": clock.describe()}, 0)
        turns = Turns(tracking_callback(tracker, clock, trainer), clock)
        trainer.add_callback(turns)
        trainer.train()
        for sink in tracker.sinks:
            sink.finish()
    steps = turns.steps[2:]  # the first two warm up
    on, off = ([s for s in steps if s[0] is switched] for switched in (True, False))
    with_it, without = (statistics.median(s[1] for s in some) for some in (on, off))
    spent = statistics.median(s[2] for s in on)
    share = statistics.median(spent / seconds for _, seconds, spent in on)
    ratios = sorted(a[1] / b[1] for a, b in zip(on, off, strict=False))
    quarter = len(ratios) // 4
    print(f"{' and '.join(('record', *sinks))}; {len(on)} steps with it, {len(off)} without")
    print(f"per step: {with_it:.3f} s with, {without:.3f} s without")
    print(f"tracking's own code: {spent * 1e3:.2f} ms, {share:.3%} of a step")
    print(f"on against off: {statistics.median(ratios):.3f} [{ratios[quarter]:.3f}, {ratios[-1 - quarter]:.3f}]")


if __name__ == "__main__":
    main()
