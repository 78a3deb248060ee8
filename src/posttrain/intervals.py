"""Means and shares with their 95% intervals. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Z95 = 1.959964


@dataclass(frozen=True)
class Share:
    """A mean over `count` rows with its 95% interval: a share, or the difference of two shares."""

    mean: float
    low: float
    high: float
    count: int


def wilson(successes: float, count: int) -> Share:
    """A share of successes with Wilson's score interval (Wilson, 1927)."""
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


def write_share(name: str, share: Share) -> dict[str, float]:
    """A share as metrics: NAME, NAME_low and NAME_high."""
    return {name: share.mean, f"{name}_low": share.low, f"{name}_high": share.high}


def read_share(metrics: Mapping[str, float], name: str, count: int) -> Share | None:
    """The share that `write_share` wrote; None if it was not measured."""
    if name not in metrics:
        return None
    return Share(metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"], count)


def percent(share: Share | None, sign: str = "") -> str:
    """A share or a change with its interval, in percent; empty for None."""
    if share is None:
        return ""
    return f"{100 * share.mean:{sign}.1f}% [{100 * share.low:{sign}.1f}, {100 * share.high:{sign}.1f}]"
