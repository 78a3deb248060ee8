"""Hands the trainer's logs, completions and alerts to the tracker, and prints one line per log."""

import math
import time
from typing import TYPE_CHECKING, Any

from ..data.conversation import text_of
from ..log import log_line
from ..runs.record import metric_name
from .performance import StepClock
from .tracker import Tracker
from .trainers import DrawsCompletions, WatchesItself

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

# The metrics that the printed line of a log shows.
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


def tracking_callback(tracker: Tracker | None, clock: StepClock, trainer: "Trainer") -> Any:
    """A callback that reports the logs of `trainer` to `tracker`, with the performance that `clock` measured.

    Every process has one, since rates are summed over processes; rank 0 reports.
    """
    from transformers import TrainerCallback

    watched = trainer if isinstance(trainer, WatchesItself) else None

    class TrackingCallback(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(
            self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any
        ) -> None:
            self.first_step = state.global_step
            self.alerted = len(watched.findings) if watched else 0
            self.finite = True
            clock.start()

        def on_pre_optimizer_step(
            self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any
        ) -> None:
            clock.before_optimizer()

        def on_optimizer_step(
            self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any
        ) -> None:
            clock.after_optimizer()

        def on_step_end(
            self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any
        ) -> None:
            clock.step()
            for finding in watched.findings[self.alerted :] if watched else ():
                self.alerted += 1
                if tracker is not None:
                    tracker.alert(finding.name, str(finding), state.global_step)

        def on_evaluate(
            self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any
        ) -> None:
            clock.skip()

        def on_save(
            self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any
        ) -> None:
            clock.skip()

        def on_log(
            self,
            args: "TrainingArguments",
            state: "TrainerState",
            control: "TrainerControl",
            logs: Any = None,
            **kwargs: Any,
        ) -> None:
            if not logs:
                return
            step, total = state.global_step, state.max_steps
            measured = clock.take(logs) if "loss" in logs else {}  # on all processes, since it sums over them
            left_s = clock.left_s(step - self.first_step, total - step)
            if left_s is not None and measured:
                measured["perf/left_s"] = left_s
            if tracker is None:
                return
            tracker.log(
                {**measured, **{metric_name(name): value for name, value in logs.items()}},
                step,
                max_steps=total,
                epoch=round(state.epoch or 0.0, 4),
                time=round(time.time(), 3),
                left_s=None if left_s is None else round(left_s, 1),
            )
            self._watch_loss(tracker, logs, step)
            if words := "  ".join(f"{k} {float(logs[k]):.4g}" for k in SHOWN if k in logs):
                log_line(f"step {step}/{total}  {words}" + (f"  {left_s:.0f} s left" if left_s else ""))
            self._report_completions(tracker, step)

        def _watch_loss(self, tracker: Tracker, logs: Any, step: int) -> None:
            finite = math.isfinite(logs.get("loss", 0.0))
            if self.finite and not finite:
                text = f"step {step}: the loss is {logs['loss']}. Lower learning_rate."
                tracker.alert("loss is not finite", text, step)
            self.finite = finite

        def _report_completions(self, tracker: Tracker, step: int) -> None:
            completions = trainer.pop_completions() if isinstance(trainer, DrawsCompletions) else []
            if not completions:
                return
            tracker.log_completions(completions, step)
            first = completions[0]
            asked, answered = (repr(text)[:60] for text in (text_of(first["prompt"]), first["completion"]))
            log_line(f"  {asked} -> {answered}  score {first['score']:.4g}  kl {first['kl']:.3g}")

    return TrackingCallback()
