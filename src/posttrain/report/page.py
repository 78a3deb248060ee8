"""A chain's report: data and figures as one HTML file. `posttrain report` calls `write_report`."""

import importlib.metadata
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from ..chain.graph import Chain
from ..chain.run import take_chain_directory
from ..config.values import flatten
from ..errors import ConfigError
from ..fileio import write_atomically
from ..intervals import percent
from ..redact import clean
from . import charts
from .collect import GLYPHS, ChainFacts, StageFacts, read_facts

REPORT = "report.html"
CHARTS_SHOWN = 4  # per stage; the others are folded away
LONG_WORD = 20  # characters
CUT = 400  # characters of a prompt or an answer
_ARROWS = {"better": "▲", "worse": "▼", "no clear change": "≈"}


def write_report(chain: Chain, output: Path | None = None) -> Path:
    """Write the report of a chain, by default to `report.html` in its directory; return the file.

    Raises ConfigError if nothing of the chain has run, a package is missing, or the output's folder does not exist;
    ArtifactError if the directory is another chain's.
    """
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"a report is drawn with {' and '.join(missing)}: pip install 'posttrain[report]'")
    if not chain.output_dir.is_dir():
        raise ConfigError(
            f"{chain.path}: {chain.output_dir} does not exist: nothing has run; use `posttrain run` first"
        )
    take_chain_directory(chain, write=False)
    path = output or chain.output_dir / REPORT
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--output {path}: expected a file in a folder that exists")
    write_atomically(path, render(read_facts(chain)))
    return path


def render(facts: ChainFacts) -> str:
    """The page as text: valid HTML, with all values escaped and without secrets."""
    template = _environment().get_template("page.html.j2")
    costs = charts.costs(facts)
    seconds = sum(s.lineage.cost.get("wall_s", 0.0) for s in facts.stages if s.lineage)
    page: str = template.render(
        facts=facts, version=importlib.metadata.version("posttrain"), css=_css(),
        done=sum(s.complete for s in facts.stages), tiles=[(s, s.measures[0]) for s in facts.stages if s.measures],
        overview=charts.overview(facts), training={s.name: _charts(s) for s in facts.stages},
        graph=charts.stage_graph(facts), costs=costs, data=_data(facts),
        total_time=f"{seconds / 60:.1f} minutes" if seconds >= 120 else f"{seconds:.0f} s",
        dirty=[c[:12] for c in facts.commits if c.endswith("-dirty")], recipe=_recipe(facts),
        percent=percent, glyph=GLYPHS.__getitem__, arrow=_ARROWS.__getitem__,
        base_name=base_name, fingerprint=_fingerprint, cut=_cut, has_long_word=_has_long_word,
        effective=_effective, shown=CHARTS_SHOWN,
    )  # fmt: skip
    return page


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def settle(value: Any) -> Any:
        """Clean the value of an expression of the template, before it is escaped."""
        return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=PackageLoader("posttrain", "report"), autoescape=True, undefined=StrictUndefined, finalize=settle,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["capital"] = lambda text: text[:1].upper() + text[1:]
    return environment


def _css() -> Any:
    from markupsafe import Markup

    return Markup((Path(__file__).parent / "page.css").read_text(encoding="utf-8").strip())


def _charts(stage: StageFacts) -> list[charts.Chart]:
    special = [*charts.paths(stage), charts.reward_distribution(stage), charts.f1_by_type(stage)]
    return [chart for chart in special if chart is not None] + charts.curves(stage)


def _data(facts: ChainFacts) -> list[dict[str, Any]]:
    rows = []
    for stage in facts.stages:
        for name, described in (stage.lineage.data if stage.lineage else {}).items():
            source = stage.config.get(f"{name}_file") or stage.config.get("dataset_name")
            if not source and "data" in stage.roles:
                source = f"the stage {stage.roles['data']}"
            rows.append(
                {
                    "stage": stage.name, "set": name, "rows": described.get("rows", 0),
                    "format": described.get("format", ""),
                    "fingerprint": str(described.get("fingerprint") or ""), "source": _source(source),
                }
            )  # fmt: skip
    return rows


def _source(source: Any) -> str:
    if isinstance(source, list):
        return ", ".join(_source(entry) for entry in source)
    if isinstance(source, Mapping):
        return f"{_source(source.get('path'))} (weight {source.get('weight', 1)})"
    return _at_home(str(source or "not recorded"))


def _at_home(path: str) -> str:
    """The path with `~` for the home folder, so that the page does not show the user's name."""
    home = os.path.expanduser("~")
    return f"~{path.removeprefix(home)}" if home != "/" and path.startswith(home + "/") else path


def base_name(stage: StageFacts) -> str:
    """A base model's name; for a folder, its last part."""
    name = str(stage.lineage.base.get("name", "")) if stage.lineage else ""
    return Path(name).name if os.path.isabs(name) else name


def _fingerprint(stage: StageFacts) -> str:
    return str(stage.lineage.base.get("fingerprint") or "") if stage.lineage else ""


def _recipe(facts: ChainFacts) -> str:
    commits = [c.removesuffix("-dirty") for c in facts.commits]
    lines = [f"git checkout {commits[0]}"] if len(commits) == 1 else []
    return "\n".join([*lines, "make setup", f"posttrain run {facts.path}", f"posttrain report {facts.path}"])


def _effective(stage: StageFacts) -> str:
    """The values that were set, one per line, as in YAML."""
    given = {k: v for k, v in flatten(stage.config).items() if v not in (None, [], {})}
    return "".join(
        yaml.safe_dump({k: _at_home(v) if isinstance(v, str) else v}, allow_unicode=True, width=10_000)
        for k, v in given.items()
    ).strip()


def _has_long_word(text: str) -> bool:
    """Whether a text has a word so long that a table must break it to fit the page."""
    return any(len(word) > LONG_WORD for word in text.split())


def _cut(text: str) -> str:
    return text if len(text) <= CUT else f"{text[:CUT]}… ({len(text):,} characters)"
