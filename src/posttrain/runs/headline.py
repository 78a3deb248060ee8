"""The numbers by which a finished stage is judged, read from its lineage. Imports no torch.

The table of recipes says which numbers a recipe has. The closing table, a finished stage's line, the report, the model
card and `posttrain lineage` all show these.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..config.metrics import Measured
from ..config.recipes import RECIPES
from ..intervals import Share, percent, read_share, wilson
from .lineage import Lineage


@dataclass(frozen=True)
class Measure:
    """One number of a finished stage.

    Attributes:
        about: its row in the table of recipes.
        after: a share with its interval, or a plain number.
        before: the same number of the stage's input, on the same rows.
        change: after less before, row by row.
        count: the number of things that a share or a count was measured on.
        split: the rows that it was measured on: train, validation or test.
    """

    about: Measured
    after: Share | float
    before: Share | None = None
    change: Share | None = None
    count: int | None = None
    split: str = "test"

    @property
    def name(self) -> str:
        return self.about.name

    @property
    def title(self) -> str:
        """The name, with what was counted or the unit: `exact match, greedy, 500 rows`."""
        if self.about.counted is not None and self.count is not None:
            joined = " from " if self.about.kind == "count" else ", "
            return f"{self.name}{joined}{self.count:,} {self.about.counted[1]}"
        return f"{self.name}, {self.about.unit}" if self.about.unit else self.name

    @property
    def value(self) -> str:
        """The number after the stage, as people read it."""
        if isinstance(self.after, Share):
            return percent(self.after)
        if self.about.kind in ("share", "rate"):
            return f"{self.after:.1%}"
        return f"{self.after:,.0f}" if self.about.kind == "count" else f"{self.after:.3g}"

    @property
    def verdict(self) -> str:
        """better, worse, or no clear change (the interval of the change contains 0); empty without a change."""
        if self.change is None:
            return ""
        return "better" if self.change.low > 0 else "worse" if self.change.high < 0 else "no clear change"

    def with_interval(self, after: Share) -> "Measure":
        return replace(self, after=after)


def headline(lineage: Lineage, *, details: bool = False) -> list[Measure]:
    """The headline measures of a finished stage that it has numbers for; with `details`, all measures."""
    recipe = RECIPES.get(lineage.recipe)
    found = [_measure(about, lineage.metrics) for about in (recipe.measures if recipe else ())]
    return [m for m in found if m is not None and (details or m.about.headline)]


def _measure(about: Measured, metrics: Mapping[str, Any]) -> Measure | None:
    values = metrics.get("after", {}) if about.paired else metrics
    if about.key not in values:
        return None
    count = values.get(about.counted[0]) if about.counted else None
    split = about.split or str(metrics.get("measured_on", "test"))
    if about.paired:
        before, after, change = (
            read_share(metrics.get(when, {}), about.key, int(count or 0)) for when in ("before", "after", "change")
        )
        assert after is not None
        return Measure(about, after, before, change, count, split)
    value = values[about.key]
    if about.kind == "share" and about.counted is not None:
        assert count is not None, f"{about.key} without {about.counted[0]}"
        return Measure(about, wilson(value * count, count), count=count, split=split)
    return Measure(about, float(value), count=count, split=split)
