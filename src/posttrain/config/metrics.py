"""What a recipe measures: curves during training, and the numbers by which a finished stage is judged.

The report and the W&B workspace draw the same panels; the closing table, the report and the model card show the same
measures. Each recipe lists its own in its row of the table (`recipes.py`). Imports no torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

NATS = "nats per completion"


@dataclass(frozen=True)
class Panel:
    """One chart of metrics over the optimizer's steps, or over another metric.

    Attributes:
        title: its heading.
        metrics: the trainer's names (`loss`, `eval_loss`, `objective/kl`) or patterns of them, in drawing order.
        unit: the unit of the vertical axis; empty if the title has it.
        over: the metric on the horizontal axis; None: the optimizer's step.
        stacked: whether the values are parts of a whole.
        everywhere: False if the metrics are logged on some devices only.
    """

    title: str
    metrics: tuple[str, ...]
    unit: str = ""
    over: str | None = None
    stacked: bool = False
    everywhere: bool = True

    def find(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that this panel shows, in drawing order."""
        known = list(names)
        found = [sorted(n for n in known if fnmatchcase(n, pattern)) for pattern in self.metrics]
        return list(dict.fromkeys(name for several in found for name in several))


@dataclass(frozen=True)
class Measured:
    """One number by which a finished stage is judged, and its place in the lineage.

    Attributes:
        key: its name in the lineage's `metrics`; if paired, in `metrics["after"]`, `["before"]` and `["change"]`.
        name: its name for people.
        kind: a share of something counted, a rate that is not a share (F1), a plain number, or a count.
        counted: what it was measured on or made from, as (key of the number, noun): ("rows", "rows").
        unit: the unit of a plain number.
        paired: whether the stage's input was measured on the same rows, so that the change has an interval.
        hub: the hub's name for this metric; if empty, the model card's metadata leave it out.
        split: the rows that it was measured on; None: see the lineage's `measured_on`.
        headline: False for a detail that only the report and the card show.
    """

    key: str
    name: str
    kind: Literal["share", "rate", "number", "count"] = "share"
    counted: tuple[str, str] | None = None
    unit: str = ""
    paired: bool = False
    hub: str = ""
    split: str | None = "test"
    headline: bool = True


# Shared by several recipes

EXACT_MATCH = (
    Measured("greedy_exact", "exact match, greedy", counted=("rows", "rows"), paired=True, hub="exact_match"),
    Measured("sampled_exact", "exact match, sampled", counted=("rows", "rows"), paired=True, hub="exact_match"),
)
STOPS = Measured("stops", "completions that end by EOS", headline=False)

LOSS = Panel("Loss", ("loss", "eval_loss"))
GRADIENT = Panel("Gradient norm", ("grad_norm",))
LEARNING_RATE = Panel("Learning rate", ("learning_rate",))
SPEED = (
    Panel("Tokens per second", ("perf/tokens_per_s",)),
    Panel("Samples per second", ("perf/samples_per_s",)),
    Panel("Seconds per step", ("time/step",), "s"),
    Panel(
        "Where the seconds go", ("time/data", "time/forward", "time/backward", "time/optimizer", "time/other"),
        "s per log", stacked=True,
    ),
    Panel("Share of the machine's peak", ("perf/mfu",), "percent"),
    Panel("Memory", ("memory/rss_gib", "memory/peak_rss_gib"), "GiB"),
    Panel(
        "Peak CUDA memory", ("memory/peak_cuda_allocated_gib", "memory/peak_cuda_reserved_gib"), "GiB", everywhere=False
    ),
    Panel("Power", ("energy/watts",), "watts", everywhere=False),
    Panel("Energy", ("energy/joules",), "joules", everywhere=False),
)  # fmt: skip
ROLLOUT_SPEED = Panel(
    "Where a rollout's seconds go", ("time/generation", "time/scoring", "time/evaluating"), "s per log", stacked=True
)
