"""The speed of a trainer, and its seconds by phase, measured between two logs.

    time/data       waiting for batches            time/forward    the model and its loss
    time/backward   gradients                      time/optimizer  the optimizer's step
    time/other      clipping, and the rest         time/step       seconds per step, in total

`time/...` are seconds of this process since the last log; a trainer may add its own (PPO's time/generation and
time/scoring). Evaluations and checkpoints are not included. Rates are sums over all processes. On CUDA, phases are
timed by events in the stream, without synchronisation. DeepSpeed takes its optimizer step in time/backward.

perf/mfu is the model's arithmetic in percent of the peak (machine.py): TRL's `compute_flops_per_token`, without the
weight gradients that a frozen base does not need, and without the head at positions that have no label.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .machine import EnergyMeter, memory_now, peak_flops
from .trainers import DrawsCompletions, trained_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

PHASES = ("data", "forward", "backward", "optimizer")


@dataclass
class Work:
    """The cost per token: FLOP of the trunk by mean row length, and of the head per token with a label."""

    trunk: Callable[[float], float]
    head: float

    def flops(self, tokens: float, labelled: float, rows: float) -> float:
        return tokens * self.trunk(tokens / rows if rows else 0.0) + labelled * self.head


class StepClock:
    """Times a trainer's phases and counts its tokens, by wrapping the trainer's methods.

    Args:
        trainer: any of transformers' trainers.
        pairs: whether a sample is two sequences, as in DPO and reward models.
    """

    def __init__(self, trainer: "Trainer", *, pairs: bool = False) -> None:
        self.trainer, self.pairs = trainer, pairs
        self.device = trainer.accelerator.device
        self.laps = _CudaLaps() if self.device.type == "cuda" else _Laps()
        self.on = True
        self.together = trainer.get_tp_size()  # processes that share one copy of the model, and so one batch
        if self.together > 1:
            trainer.training_step = self._counted(trainer.training_step)
        trainer.get_batch_samples = self._timed("data", trainer.get_batch_samples)
        trainer.compute_loss = self._timed_loss(trainer.compute_loss)
        trainer.accelerator.backward = self._timed("backward", trainer.accelerator.backward)
        self.work = describe_work(trainer)
        dtype = "bfloat16" if trainer.args.bf16 else "float16" if trainer.args.fp16 else "float32"
        self.peak, self.peak_source = peak_flops(self.device, dtype)
        self.energy = EnergyMeter(self.device)
        self.start()

    def describe(self) -> dict[str, Any]:
        """Peak rate and energy counter, for a run's config."""
        return {"peak_flops": self.peak, "peak": self.peak_source, "energy": self.energy.source or "not measured here"}

    def start(self) -> None:
        """Start timing; all counts are reset."""
        self._clear()
        self.marked = self.begun = time.perf_counter()
        self.last_joules = self.energy.joules()

    def _clear(self) -> None:
        import torch

        self.counts = torch.zeros(3, device=self.device)  # tokens, tokens with a label, rows
        self.seconds, self.steps = 0.0, 0
        self.laps.clear()

    # Called by the trainer

    def _timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return function(*args, **kwargs)
            begun = self.laps.now()
            result = function(*args, **kwargs)
            self.laps.add(phase, begun)
            return result

        return timed

    def _timed_loss(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(model: "PreTrainedModel", inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.on or not self.trainer.model.training:
                return function(model, inputs, *args, **kwargs)
            if self.together == 1:
                self._count(inputs)  # after they were prepared, since PPO's are drawn there
            begun = self.laps.now()
            result = function(model, inputs, *args, **kwargs)
            self.laps.add("forward", begun)
            return result

        return timed

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """For a split model: count the batch once, since its stages compute the loss of parts of it, or none."""

        def counted(model: "PreTrainedModel", inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if self.on:
                self._count(inputs)
            return function(model, inputs, *args, **kwargs)

        return counted

    def _count(self, inputs: Any) -> None:
        import torch

        masks = [inputs[k] for k in ("attention_mask", "prompt_mask", "completion_mask") if inputs.get(k) is not None]
        if inputs.get("attention_mask") is not None:
            masks = masks[:1]
        ids = inputs.get("input_ids")
        if not masks and ids is None:
            return
        positions = inputs.get("position_ids")
        if masks or positions is None:
            rows = torch.tensor((masks[0] if masks else ids).shape[0], device=self.device)
        else:
            rows = (positions == 0).sum()  # rows without padding, concatenated
        tokens = sum(m.sum() for m in masks) if masks else torch.tensor(ids.numel(), device=self.device)
        completion = inputs.get("completion_mask")
        labels = inputs.get("labels")
        if completion is not None:
            labelled = completion.sum()
        else:
            labelled = (labels != -100).sum() if labels is not None else torch.zeros((), device=self.device)
        self.counts += torch.stack([tokens.float(), labelled.float(), rows.float()])

    # Called by the callback

    def before_optimizer(self) -> None:
        self.optimizer_begun = self.laps.now()

    def after_optimizer(self) -> None:
        self.laps.add("optimizer", self.optimizer_begun)

    def step(self) -> None:
        """An optimizer step has ended."""
        now = time.perf_counter()
        self.seconds += now - self.marked
        self.marked, self.steps = now, self.steps + 1

    def skip(self) -> None:
        """Do not count the time since the last step, spent on an evaluation or a checkpoint."""
        self.marked = time.perf_counter()

    def left_s(self, done: int, left: int) -> float | None:
        """Estimated seconds of the `left` steps, by the mean of the `done` ones; None before the first."""
        return (time.perf_counter() - self.begun) / done * left if done else None

    def take(self, own: Mapping[str, float]) -> dict[str, float]:
        """The metrics since the last call, over all processes. All of them must call it.

        Args:
            own: the trainer's log, whose `time/...` are parts of their own.
        """
        if not self.steps:
            return {}
        accelerator = self.trainer.accelerator
        tokens, labelled, rows = (accelerator.reduce(self.counts, "sum") / self.together).tolist()
        seconds = {f"time/{phase}": s for phase, s in self.laps.seconds().items()}
        named = seconds | {k: v for k, v in own.items() if k.startswith("time/")}
        found = seconds | {
            "time/other": max(0.0, self.seconds - sum(named.values())),
            "time/step": self.seconds / self.steps,
            "perf/tokens_per_s": tokens / self.seconds,
            "perf/samples_per_s": rows / (2 if self.pairs else 1) / self.seconds,
        }
        rate = self.work.flops(tokens, labelled, rows) / self.seconds if self.work is not None else 0.0
        if rate:
            found["perf/mfu"] = 100 * rate / (self.peak * accelerator.num_processes)
        found |= memory_now(self.device)
        joules = self.energy.joules()
        if joules is not None and self.last_joules is not None:
            found["energy/joules"] = joules
            found["energy/watts"] = (joules - self.last_joules) / self.seconds
            self.last_joules = joules
        self._clear()
        return found


class _Laps:
    """Seconds by phase, measured by the wall clock."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.sums = dict.fromkeys(PHASES, 0.0)

    def now(self) -> Any:
        return time.perf_counter()

    def add(self, phase: str, begun: Any) -> None:
        self.sums[phase] += time.perf_counter() - begun

    def seconds(self) -> dict[str, float]:
        return dict(self.sums)


class _CudaLaps(_Laps):
    """Seconds by phase, measured by the device: when a phase returns, the work that it queued may still run."""

    def clear(self) -> None:
        super().clear()
        self.events: list[tuple[str, Any, Any]] = []

    def now(self) -> Any:
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def add(self, phase: str, begun: Any) -> None:
        self.events.append((phase, begun, self.now()))

    def seconds(self) -> dict[str, float]:
        for phase, begun, ended in self.events:
            ended.synchronize()
            self.sums[phase] += begun.elapsed_time(ended) / 1e3
        self.events = []
        return dict(self.sums)


# Arithmetic


def describe_work(trainer: "Trainer") -> Work:
    """FLOP of training per token.

    Training has a forward pass, a gradient of the activations and a gradient of the weights; TRL's
    `compute_flops_per_token` is the sum of the three. A frozen base needs two of them. DPO's reference is one more. A
    trainer that samples completions tells its additional passes (`passes_per_token`).
    """
    passes = 3.0 if all(p.requires_grad for p in trainer.model.parameters()) else 2.0
    if isinstance(trainer, DrawsCompletions):
        passes += trainer.passes_per_token
    elif not getattr(trainer.args, "precompute_ref_log_probs", True):  # only DPO's have it
        passes += 1.0
    return _work_of(trained_model(trainer), passes)


def _work_of(model: "PreTrainedModel", passes: float) -> Work:
    from ..upstream.trl import compute_flops_per_token

    config = model.config.get_text_config()
    fits = all(hasattr(config, k) for k in ("num_key_value_heads", "intermediate_size", "num_attention_heads"))
    if fits:  # a decoder with gated layers, for which TRL's formula is made
        head = 2 * config.vocab_size * config.hidden_size
        return Work(lambda length: passes * (compute_flops_per_token(config, int(length)) / 3 - head), passes * head)
    embeddings = {id(p) for m in model.modules() if type(m).__name__ == "Embedding" for p in m.parameters()}
    weights = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if id(p) not in embeddings)
    return Work(lambda length: passes * 2 * weights, 0.0)
