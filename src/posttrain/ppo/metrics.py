"""PPO's metrics, accumulated over steps and processes until the next log."""

import time
from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import objective

if TYPE_CHECKING:
    from accelerate import Accelerator

# Metrics of an update, each the mean over tokens and processes.
TOKEN_METRICS = (
    "loss/policy", "loss/value", "policy/approx_kl", "policy/clip_fraction", "policy/ratio", "value/clip_fraction",
)  # fmt: skip


class Metrics:
    """Metrics since the last log, separately for training and evaluation (`mode`: `train` or `eval`).

    `mean`, `std` and `take` reduce over all processes, so all of them must call these.
    """

    def __init__(self, accelerator: "Accelerator") -> None:
        self.accelerator = accelerator
        self.values: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        nothing = torch.zeros(len(TOKEN_METRICS) + 1, dtype=torch.float64, device=accelerator.device)
        self.sums = {"train": nothing, "eval": nothing.clone()}  # the last one is the number of tokens

    def add(self, mode: str, name: str, value: float) -> None:
        """Add a value of a metric. `take` returns the mean of its values, but the sum of seconds (`time/...`)."""
        self.values[mode][name].append(value)

    def lap(self, mode: str, name: str, since: float) -> float:
        """Add the seconds since the clock reading `since`, and return the clock now."""
        now = time.perf_counter()
        self.add(mode, name, now - since)
        return now

    def add_tokens(self, mode: str, values: tuple[Tensor, ...], mask: Tensor) -> None:
        """TOKEN_METRICS of a micro-batch, each (B, T) and zero where `mask` is."""
        self.sums[mode] += torch.stack([t.sum() for t in (*values, mask)]).double()

    def mean(self, values: Tensor) -> float:
        """Mean over all processes of values (B,)."""
        pair = torch.stack([values.double().sum(), torch.tensor(float(len(values)), device=values.device).double()])
        total, count = self.accelerator.reduce(pair, "sum").tolist()
        return total / count if count else float("nan")

    def std(self, values: Tensor, mask: Tensor) -> float:
        """Standard deviation over all processes of the values where `mask` is 1."""
        count, first, second = self.accelerator.reduce(objective.moments(values, mask), "sum").tolist()
        return float(max(0.0, second / count - (first / count) ** 2) ** 0.5)

    def take(self, mode: str) -> dict[str, float]:
        """Return all metrics for the log, and reset them."""
        taken = {}
        for name, values in self.values[mode].items():
            known = [v for v in values if v == v]
            if known:
                taken[name] = sum(known) / (1 if name.startswith("time/") else len(known))
        self.values[mode].clear()
        *totals, tokens = self.accelerator.reduce(self.sums[mode], "sum").tolist()
        if tokens:
            taken |= {name: total / tokens for name, total in zip(TOKEN_METRICS, totals, strict=True)}
        self.sums[mode] = torch.zeros_like(self.sums[mode])
        return taken
