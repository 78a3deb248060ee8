"""What a stage writes while it trains, as JSON lines and as lines for people.

    metrics.jsonl        the numbers of each log
    completions.jsonl    what the policy answered, and how it was scored, where a trainer draws

Each line has its step. After a resume the lines past the checkpoint are dropped: they are about to be made again.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from .artifacts import write_atomically
from .evaluation import text_of

METRICS, COMPLETIONS = "metrics.jsonl", "completions.jsonl"
# What a line of progress shows of a log.
SHOWN = (
    "loss",
    "eval_loss",
    "eval_f1",
    "accuracy",
    "rewards/margins",
    "objective/scores",
    "objective/kl",
    "objective/entropy",
)


def say(text: str) -> None:
    """One line for the user, from the first process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)


def drop_lines_after(path: Path, step: int) -> None:
    """Keep the records up to `step`, and not the half line that a kill left."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record.get("step", 0) <= step:
            kept.append(line)
    write_atomically(path, "".join(f"{line}\n" for line in kept))


def append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, default=str, ensure_ascii=False) + "\n")


def metrics_writer(path: Path, resumed_step: int) -> Any:
    """A callback that appends one JSON object a log to `path` and prints one line."""
    from transformers import TrainerCallback

    class MetricsWriter(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.begun, self.first_step = time.monotonic(), state.global_step
            if state.is_world_process_zero:
                drop_lines_after(path, resumed_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if not state.is_world_process_zero or not logs:
                return
            elapsed = time.monotonic() - self.begun
            done = state.global_step - self.first_step
            left = elapsed / done * (state.max_steps - state.global_step) if done else None
            record = {
                "step": state.global_step,
                "max_steps": state.max_steps,
                "epoch": round(state.epoch or 0.0, 4),
                "time": round(time.time(), 3),
                "left_s": None if left is None else round(left, 1),
                **{k: v for k, v in logs.items() if k != "epoch"},
            }
            append(path, record)
            shown = {k: logs[k] for k in SHOWN if k in logs}
            words = "  ".join(f"{k} {float(v):.4g}" for k, v in shown.items())
            say(f"step {state.global_step}/{state.max_steps}  {words}" + (f"  {left:.0f} s left" if left else ""))

    return MetricsWriter()


def completions_writer(path: Path, resumed_step: int, collector: Any) -> Any:
    """A callback that appends the completions in `collector.drawn` to `path` at each log, and prints the first."""
    from transformers import TrainerCallback

    class CompletionsWriter(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                drop_lines_after(path, resumed_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if not state.is_world_process_zero or not collector.drawn:
                return
            for drawn in collector.drawn:
                append(path, {"step": state.global_step, **drawn})
            first = collector.drawn[0]
            asked, answered = (repr(text)[:60] for text in (text_of(first["prompt"]), first["completion"]))
            say(f"  {asked} -> {answered}  score {first['score']:.4g}  kl {first['kl']:.3g}")
            collector.drawn = []

    return CompletionsWriter()
