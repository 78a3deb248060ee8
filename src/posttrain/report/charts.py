"""The figures of a report, each an inline SVG with a sentence that says the same in words.

Series differ by dash and marker, not by colour alone. A line is the mean per bucket of steps; the band around it spans
the bucket's minimum to maximum.
"""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ..config.metrics import Panel
from ..config.recipes import RECIPES
from ..fileio import GIB
from ..intervals import Share, percent
from ..redact import clean
from . import svg
from .answers import BASE
from .collect import GLYPHS, ChainFacts, StageFacts
from .curves import Curve, Log
from .svg import DASHES, INK, MARKERS, MUTED, PANEL, SERIES

SHOWN_SERIES = 6
SPIKE = 30  # beyond this multiple of the median the axis is logarithmic


@dataclass(frozen=True)
class Chart:
    title: str
    picture: Markup
    words: str  # the content of the picture, for people who cannot see it
    caption: str = ""


def short(text: str, most: int) -> str:
    text = " ".join(clean(text).split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def curves(stage: StageFacts) -> list[Chart]:
    """One chart per panel of the stage's recipe that its log has values for."""
    charts = []
    for number, panel in enumerate(p for p in RECIPES[stage.recipe].all_panels if p.over is None):
        names = [n for n in panel.find(stage.log.curves) if stage.log.curves[n].count]
        if names:
            charts.append(_lines(f"{_slug(stage.name)}-p{number}", panel, names, stage.log))
    return charts


def _lines(name: str, panel: Panel, names: Sequence[str], log: Log) -> Chart:
    shown, left_out = names[:SHOWN_SERIES], names[SHOWN_SERIES:]
    all_curves = [log.curves[n] for n in shown]
    with svg.style():
        rows = -(-len(shown) // 2) if len(shown) > 1 else 0
        figure, axes = svg.new_axes(height=2.35 + 0.2 * rows, top=0.1 + 0.2 * rows)
        for metric, curve, colour, dash, marker in zip(shown, all_curves, SERIES, DASHES, MARKERS, strict=False):
            _draw(axes, metric, curve, colour, dash, marker)
        low, high = min(c.low for c in all_curves), max(c.high for c in all_curves)
        usual = statistics.median(mean for curve in all_curves for _, _, mean, _ in curve.points)
        if low > 0 and high > SPIKE * usual:  # otherwise all but a spike would be on the axis
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(lambda value, _: "")
        axes.yaxis.set_major_formatter(lambda value, _: _short_number(value))
        _step_axis(axes)
        if len(shown) > 1:
            _legend(axes)
        words = "; ".join(_in_words(metric, curve) for metric, curve in zip(shown, all_curves, strict=True))
        if left_out:
            words += f"; not drawn: {', '.join(left_out)}"
        caption = f"{words}." if len(shown) <= 2 else ""  # with more lines it would be longer than the picture
        title = f"{panel.title}, {panel.unit}" if panel.unit else panel.title
        return Chart(title, svg.to_svg(figure, name=name, label=f"{title}. {words}"), words, caption)


def _draw(axes: Any, metric: str, curve: Curve, colour: str, dash: Any, marker: str) -> None:
    steps, lows, means, highs = zip(*curve.points, strict=True)
    if curve.width > 1:
        axes.fill_between(steps, lows, highs, color=colour, alpha=0.22, linewidth=0)
    every = max(1, len(steps) // 8)
    axes.plot(
        steps, means, color=colour, linestyle=dash, marker=marker, markevery=(0, every), label=short(metric, 26),
    )  # fmt: skip


def _legend(axes: Any, columns: int = 2) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=columns, borderaxespad=0.1, columnspacing=1.2)


def _step_axis(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: _short_number(step)))
    axes.set_xlabel("step")


def _short_number(value: float) -> str:
    """A tick's label that fits beside an axis: 20k, 0.25, 4e-04."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.0e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def _in_words(metric: str, curve: Curve) -> str:
    if curve.count == 1:
        return f"{metric} {curve.last:.4g}"
    return (
        f"{metric} from {curve.first:.4g} to {curve.last:.4g} (least {curve.low:.4g}, greatest {curve.high:.4g}, "
        f"{curve.count:,} values)"
    )


def paths(stage: StageFacts) -> list[Chart]:
    """One chart per panel of a metric over another: a stage's path, such as PPO's reward against KL."""
    drawn = (_path(stage, panel) for panel in RECIPES[stage.recipe].all_panels if panel.over is not None)
    return [chart for chart in drawn if chart is not None]


def _path(stage: StageFacts, panel: Panel) -> Chart | None:
    assert panel.over is not None
    right, up = (stage.log.curves.get(name) for name in (panel.over, panel.metrics[0]))
    if right is None or up is None or right.width != up.width:
        return None
    both = sorted(right.buckets.keys() & up.buckets.keys())
    if len(both) < 2:
        return None
    xs, ys = [right.mean_of(n) for n in both], [up.mean_of(n) for n in both]
    with svg.style():
        figure, axes = svg.new_axes(height=2.55, top=0.3)
        axes.plot(xs, ys, color=SERIES[0], linewidth=0.8, alpha=0.55)
        axes.scatter(xs, ys, s=12, color=SERIES[0], linewidths=0)
        for place, text, marker in ((0, "start", "o"), (-1, "end", "D")):
            axes.plot(
                xs[place], ys[place], marker=marker, markersize=8, markerfacecolor=PANEL, markeredgecolor=INK,
                markeredgewidth=1.6, linestyle="none", label=text,
            )  # fmt: skip
        _legend(axes)
        axes.set_xlabel(panel.over)
        words = (
            f"from {ys[0]:.4g} at {panel.over} {xs[0]:.3g} to {ys[-1]:.4g} at {xs[-1]:.3g}; "
            f"greatest value {max(ys):.4g}, greatest {panel.over} {max(xs):.3g}"
        )
        picture = svg.to_svg(figure, name=f"{_slug(stage.name)}-path", label=f"{panel.title}: {words}")
    return Chart(f"{panel.title}, {panel.unit}", picture, words, f"Its path: {words}.")


def reward_distribution(stage: StageFacts) -> Chart | None:
    """A histogram of the recorded completions' scores: the first third of the steps, and the last."""
    rows = [
        (float(r["step"]), float(r["score"]))
        for r in stage.completions
        if _is_number(r.get("step")) and _is_number(r.get("score"))
    ]
    if len(rows) < 6:
        return None
    first, last = min(step for step, _ in rows), max(step for step, _ in rows)
    early = [score for step, score in rows if step <= first + (last - first) / 3]
    late = [score for step, score in rows if step >= last - (last - first) / 3]
    low, high = min(score for _, score in rows), max(score for _, score in rows)
    if low == high:
        return None
    bins = 20
    edges = [low + (high - low) * n / bins for n in range(bins + 1)]
    with svg.style():
        figure, axes = svg.new_axes(height=2.55, top=0.3)
        for scores, label, colour, dash, fill in (
            (early, "first third", SERIES[1], DASHES[1], 0.0), (late, "last third", SERIES[0], DASHES[0], 0.22),
        ):  # fmt: skip
            counts = [0] * bins
            for score in scores:
                counts[min(bins - 1, int((score - low) / (high - low) * bins))] += 1
            shares = [count / len(scores) for count in counts]
            axes.stairs(shares, edges, color=colour, linestyle=dash, linewidth=1.6, label=f"{label} ({len(scores):,})")
            if fill:
                axes.stairs(shares, edges, color=colour, alpha=fill, fill=True)
        _legend(axes)
        axes.set_xlabel("score per completion")
        words = f"mean {_mean(early):.4g} in the first third of the steps, {_mean(late):.4g} in the last"
        kept = (
            "the recorded ones of each rollout"
            if stage.completions_all
            else f"{len(rows):,} recorded ones, evenly spaced over the run"
        )
        picture = svg.to_svg(figure, name=f"{_slug(stage.name)}-scores", label=f"Distribution of scores: {words}")
    return Chart("Distribution of scores, share of completions", picture, words, f"Completions: {kept}; {words}.")


def intervals(title: str, rows: Sequence[tuple[str, str, Share]], *, name: str) -> Chart | None:
    """A dot with its 95% interval for each (label, series, share); series differ by marker."""
    if not rows:
        return None
    labels = list(dict.fromkeys(label for label, _, _ in rows))
    series = list(dict.fromkeys(kind for _, kind, _ in rows))
    with svg.style():
        top = 0.3 if len(series) > 1 else 0.1
        figure, axes = svg.new_axes(height=0.46 + top + 0.34 * len(labels), left=_room(labels), top=top)
        for number, kind in enumerate(series):
            mine = [(label, share) for label, k, share in rows if k == kind]
            offset = (number - (len(series) - 1) / 2) * 0.3
            ys = [labels.index(label) + offset for label, _ in mine]
            xs = [100 * share.mean for _, share in mine]
            errors = [
                [max(0.0, 100 * (s.mean - s.low)) for _, s in mine],
                [max(0.0, 100 * (s.high - s.mean)) for _, s in mine],
            ]  # fmt: skip
            axes.errorbar(
                xs, ys, xerr=errors, fmt=MARKERS[number], color=SERIES[number], markersize=6, capsize=3, label=kind,
                markerfacecolor=SERIES[number] if number == 0 else PANEL, markeredgewidth=1.4,
            )  # fmt: skip
        axes.set_yticks(range(len(labels)), [short(label, 18) for label in labels])
        axes.tick_params(axis="y", labelcolor=INK, length=0)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("percent, with 95% intervals")
        low, high = min(100 * s.low for _, _, s in rows), max(100 * s.high for _, _, s in rows)
        room = max(4.0, 0.06 * (high - low))
        axes.set_xlim(max(-2.0, low - room), min(102.0, high + room))
        if len(series) > 1:
            _legend(axes, 3)
        words = "; ".join(f"{label}, {kind}: {percent(share)}" for label, kind, share in rows)
        return Chart(title, svg.to_svg(figure, name=name, label=f"{title}. {words}"), words)


def overview(facts: ChainFacts) -> Chart | None:
    """Exact match of the base and of every measured stage."""
    rows: list[tuple[str, str, Share]] = []
    for stage in facts.stages:
        for measure in stage.measures:
            if not (measure.about.paired and isinstance(measure.after, Share)):
                continue
            kind = measure.name.removeprefix("exact match, ")
            if measure.before is not None and "policy" not in stage.roles and (BASE, kind) not in {r[:2] for r in rows}:
                rows.append((BASE, kind, measure.before))
            rows.append((stage.name, kind, measure.after))
    return intervals("Exact match on the test rows", rows, name="overview")


def f1_by_type(stage: StageFacts) -> Chart | None:
    if stage.entities is None:
        return None
    sentences = stage.entities.sentences
    rows = [
        ("all types" if s.label == "micro" else s.label, "F1", Share(s.f1, s.f1_low, s.f1_high, sentences))
        for s in stage.entities.scores
    ]
    return intervals("Entity F1 by type", rows, name=f"{_slug(stage.name)}-f1")


def costs(facts: ChainFacts) -> list[Chart]:
    """Time and memory of the complete stages, as measured."""
    done = [s for s in facts.stages if s.lineage is not None]
    charts = []
    for title, key, unit, size in (
        ("Time", "wall_s", "s", 1), ("Peak memory of the process", "peak_rss_bytes", "GiB", GIB),
        ("Peak memory of the GPU", "peak_gpu_bytes", "GiB", GIB),
    ):  # fmt: skip
        values = [
            (s.name, s.lineage.cost[key] / size) for s in done if s.lineage and _is_number(s.lineage.cost.get(key))
        ]
        if values:
            charts.append(_bars(title, values, unit, name=f"cost-{key.replace('_', '-')}"))
    return charts


def _bars(title: str, values: Sequence[tuple[str, float]], unit: str, *, name: str) -> Chart:
    with svg.style():
        figure, axes = svg.new_axes(height=0.56 + 0.32 * len(values), left=_room([label for label, _ in values]))
        axes.barh(range(len(values)), [v for _, v in values], height=0.6, color=SERIES[0], alpha=0.8)
        top = max(v for _, v in values) or 1.0
        for place, (_, value) in enumerate(values):
            axes.text(value + top * 0.02, place, f"{value:.3g} {unit}", va="center", ha="left", fontsize=10)
        axes.set_xlim(0, top * 1.25)
        axes.set_yticks(range(len(values)), [short(label, 18) for label, _ in values])
        axes.tick_params(axis="y", labelcolor=INK, length=0)
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(_ticks())
        words = ", ".join(f"{label} {value:.3g} {unit}" for label, value in values)
        return Chart(title, svg.to_svg(figure, name=name, label=f"{title}: {words}"), words)


def _room(labels: Sequence[str]) -> float:
    """The width of the labels on the left, in inches."""
    return 0.2 + 0.088 * max(len(short(label, 18)) for label in labels)


def _ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4)


# The stage graph


def stage_graph(facts: ChainFacts) -> Chart:
    """The stage graph from top to bottom; a rail on the left leads from a stage to those that use its result."""
    from matplotlib.patches import FancyBboxPatch

    names = [s.name for s in facts.stages]
    lanes = rails([(s.name, dict(s.roles)) for s in facts.stages])
    tracks = 1 + max((lane for _, _, _, lane in lanes), default=-1)
    width, row, box, left = svg.WIDTH, 0.86, 0.7, 0.1 + 0.19 * tracks
    with svg.style():
        figure, axes = svg.new_axes(width, row * len(names))
        axes.set_position((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, width)
        axes.set_ylim(row * len(names), 0)
        middles = {name: row * (place + 0.5) for place, name in enumerate(names)}
        entered: Counter[str] = Counter()
        for number, (parent, _, children, lane) in enumerate(reversed(lanes)):  # the longest is solid
            x, y = 0.06 + 0.19 * (tracks - 1 - lane), middles[parent] + 0.2
            look = {"color": SERIES[number % len(SERIES)], "linestyle": DASHES[number % len(DASHES)], "linewidth": 1.5}
            ends = []
            for child in children:
                ends.append(middles[child] - 0.22 + 0.13 * entered[child])
                entered[child] += 1
                axes.plot([x, left - 0.05], [ends[-1]] * 2, **look)
                axes.plot(left - 0.05, ends[-1], marker=">", markersize=5, color=look["color"], markeredgewidth=0)
            axes.plot([left, x, x], [y, y, max(ends)], solid_joinstyle="round", **look)
        for stage in facts.stages:
            y = middles[stage.name]
            axes.add_patch(
                FancyBboxPatch(
                    (left, y - box / 2), width - left - 0.03, box, boxstyle="round,pad=0,rounding_size=0.07",
                    facecolor=PANEL, edgecolor=INK if stage.complete else MUTED, linewidth=1.2,
                    linestyle="-" if stage.complete else (0, (4, 2)), zorder=3,
                )
            )  # fmt: skip
            key = f"key {stage.lineage.key[:12]}" if stage.lineage else ""
            made_from = " · ".join(f"{role} from {short(parent, 16)}" for role, parent in stage.roles.items())
            for x, down, ha, text, options in (
                (left + 0.1, -0.2, "left", short(stage.name, 26), {"fontsize": 11, "fontweight": "bold"}),
                (width - 0.12, -0.2, "right", GLYPHS[stage.state], {"fontsize": 9.5}),
                (left + 0.1, 0.02, "left", made_from or "from the base model", {"fontsize": 9.5}),
                (
                    left + 0.1,
                    0.22,
                    "left",
                    " · ".join(filter(None, (stage.recipe, key))),
                    {"fontsize": 9, "color": MUTED},
                ),
            ):
                axes.text(x, y + down, text, ha=ha, va="center", zorder=4, **options)
        words = "; ".join(
            f"{s.name} ({s.state})" + "".join(f", {role} from {parent}" for role, parent in s.roles.items())
            for s in facts.stages
        )
        return Chart("Stages", svg.to_svg(figure, name="graph", label=f"Stage graph: {words}"), words)


def rails(stages: Sequence[tuple[str, dict[str, str]]]) -> list[tuple[str, str, list[str], int]]:
    """The rails as (parent, role, children, lane): one per stage and role in which others use its result.

    `stages` are (name, role -> parent), parents first. Rails that overlap vertically get different lanes; lane 0 is
    next to the stages.
    """
    children: dict[tuple[str, str], list[str]] = {}
    for name, roles in stages:
        for role, parent in roles.items():
            children.setdefault((parent, role), []).append(name)
    place = {name: number for number, (name, _) in enumerate(stages)}
    taken: list[tuple[int, int, int]] = []
    found = []
    for (parent, role), several in sorted(children.items(), key=lambda item: place[item[1][-1]] - place[item[0][0]]):
        first, last = place[parent], place[several[-1]]
        busy = {lane for start, end, lane in taken if start <= last and first <= end}
        lane = next(n for n in itertools.count() if n not in busy)
        taken.append((first, last, lane))
        found.append((parent, role, several, lane))
    return found


# Words


def _mean(values: Iterable[float]) -> float:
    several = list(values)
    return sum(several) / len(several)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _slug(name: str) -> str:
    """A stage's name as an id; other characters become their number, so that different names stay different."""
    return "s-" + "".join(c if c.isascii() and c.isalnum() else f"_{ord(c):x}_" for c in name)
