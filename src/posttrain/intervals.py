"""Means and shares with their 95% intervals. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Z95 = 1.959964


@dataclass(frozen=True)
class Share:
    """A mean with its 95% interval over `count` rows: a share, or the difference of two."""

    mean: float
    low: float
    high: float
    count: int


def wilson(successes: float, count: int) -> Share:
    """Wilson's score interval of a binomial share (Wilson, 1927)."""
    p, z2 = successes / count, Z95**2
    centre = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return Share(p, max(0.0, centre - half), min(1.0, centre + half), count)


def mean_interval(values: Sequence[float], *, lowest: float = 0.0) -> Share:
    """The mean of per-row scores in [`lowest`, 1], with a normal interval over the rows."""
    count = len(values)
    mean = sum(values) / count
    variance = sum((v - mean) ** 2 for v in values) / max(1, count - 1)
    half = Z95 * math.sqrt(variance / count)
    return Share(mean, max(lowest, mean - half), min(1.0, mean + half), count)


def as_metrics(name: str, share: Share) -> dict[str, float]:
    """A share as three numbers, which `in_percent` reads again: `name`, `name_low` and `name_high`."""
    return {name: share.mean, f"{name}_low": share.low, f"{name}_high": share.high}


def in_percent(metrics: Mapping[str, float], name: str, sign: str = "") -> str:
    """A share or a change with its interval, as people read it; empty when it was not measured."""
    if name not in metrics:
        return ""
    mean, low, high = (100 * metrics[key] for key in (name, f"{name}_low", f"{name}_high"))
    return f"{mean:{sign}.1f}% [{low:{sign}.1f}, {high:{sign}.1f}]"
