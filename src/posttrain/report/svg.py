"""matplotlib figures as SVG for a page: with the page's colours and fonts, small, and with unique ids.

Colours are written as placeholders and become CSS variables, so that a figure suits light mode, dark mode and print.
Text stays text. `charts.py` decides what is drawn.
"""

import io
import re
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

from ..redact import clean, redact

# Placeholder -> CSS variable: six series colours, then text, muted text, grid lines, and background.
SERIES = tuple(f"#0a00{n:02x}" for n in range(1, 7))
INK, MUTED, GRID, PAPER, PANEL = "#0b0001", "#0b0002", "#0b0003", "#0b0004", "#0b0005"

_VARIABLES = {
    **{colour: f"var(--c{n})" for n, colour in enumerate(SERIES, 1)},
    INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)", PANEL: "var(--panel)",
}  # fmt: skip

# A dash pattern and a marker per series, to tell them apart without colour.
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)), (0, (3, 1.5)), (0, (8, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P")
WIDTH = 4.6

_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "posttrain", "text.parse_math": False, "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True, "font.family": "DejaVu Sans", "font.size": 10, "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID, "xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6, "axes.spines.top": False,
    "axes.spines.right": False, "xtick.bottom": False, "ytick.left": False,
    "axes.linewidth": 0.8, "lines.linewidth": 1.6, "lines.markersize": 4,
    "legend.frameon": False, "legend.fontsize": 9.5, "legend.handlelength": 2.6, "figure.facecolor": "none",
    "axes.facecolor": "none", "savefig.facecolor": "none", "path.simplify": True, "axes.axisbelow": True,
}  # fmt: skip

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_NUMBER = re.compile(r"-?\d+\.\d+")
_FONT = re.compile(r"font: (?:(bold|\d{3}) )?([\d.]+)px [^;]*")


def style() -> Any:
    """The matplotlib context in which a figure is made and written."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def new_axes(width: float = WIDTH, height: float = 2.35, *, left: float = 0.5, top: float = 0.1) -> tuple[Any, Any]:
    """A figure and its axes; sizes are in inches. An inch is 72 CSS pixels on a phone-wide page.

    Margins are fixed: measuring the labels for a layout would take as long as drawing them.
    """
    from matplotlib.figure import Figure

    bottom, right = 0.46, 0.12
    figure = Figure(figsize=(width, height))
    rectangle = left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height
    return figure, figure.add_axes(rectangle)


def to_svg(figure: Any, *, name: str, label: str) -> Markup:
    """An inline `<svg>`; `name` is unique on the page, `label` is what a screen reader says."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    figure.set_dpi(72)
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    used = set(re.findall(r"#([\w-]+)", " ".join(v for e in root.iter() for k, v in e.attrib.items() if "ref" in k)))
    used |= set(re.findall(r"url\(#([\w-]+)\)", " ".join(v for e in root.iter() for v in e.attrib.values())))
    for element in root.iter():
        _settle(element, name, used)
    root.attrib.clear()
    width, height = figure.get_size_inches() * 72
    root.attrib |= {
        "class": "chart", "viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-label": clean(label),
    }  # fmt: skip
    ElementTree.register_namespace("", _SVG)
    text = ElementTree.tostring(root, encoding="unicode")
    return Markup(text.replace(f' xmlns="{_SVG}"', ""))


def _settle(element: Any, name: str, used: set[str]) -> None:
    """Use the page's colours and fonts, short numbers and unique ids; remove secrets from text."""
    attributes = element.attrib
    identifier = attributes.pop("id", None)
    if identifier in used:
        attributes["id"] = f"{name}-{identifier}"
    reference = attributes.pop(f"{{{_XLINK}}}href", None)
    if reference is not None:
        attributes["href"] = f"#{name}-{reference[1:]}"
    if "clip-path" in attributes:
        attributes["clip-path"] = attributes["clip-path"].replace("url(#", f"url(#{name}-")
    for key in ("d", "transform", "x", "y", "width", "height", "points", "style"):
        if key in attributes:
            value = _NUMBER.sub(lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), attributes[key])
            attributes[key] = re.sub(r"\s+", " ", value).strip()
    if "style" in attributes:
        value = _FONT.sub(
            lambda m: f"font-size: {m[2]}px" + (f"; font-weight: {m[1]}" if m[1] else ""), attributes["style"]
        )
        for placeholder, variable in _VARIABLES.items():
            value = value.replace(placeholder, variable)
        attributes["style"] = value.replace(": ", ":").replace("; ", ";")
    if element.text and element.tag.endswith("text"):
        element.text = redact(element.text)
