"""The results of a chain's stages: one line per stage, and the closing table. Imports no torch."""

import os
from collections.abc import Mapping
from pathlib import Path

from ..fileio import GIB
from ..intervals import percent
from ..runs.headline import headline
from ..runs.lineage import is_complete, read_lineage


def closing_table(title: str, run_dirs: Mapping[str, Path], width: int = 160) -> str:
    """The measures of each stage (name -> run directory): before, after, change. Then the cost of each stage."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("stage", "measure", "before -> after", "change"):
        table.add_column(column, justify="left" if column in ("stage", "measure") else "right")
    for name, run_dir in run_dirs.items():
        measures = headline(read_lineage(run_dir)) if is_complete(run_dir) else []
        for number, measure in enumerate(measures):
            before = f"{percent(measure.before)} -> " if measure.before else ""
            table.add_row(
                name if number == 0 else "", measure.title, before + measure.value, percent(measure.change, "+")
            )
        if not measures:
            table.add_row(name, "" if is_complete(run_dir) else "not complete")
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115  rich wants an open file
    console.print(table)
    costs = [_cost_line(name, run_dir) for name, run_dir in run_dirs.items() if is_complete(run_dir)]
    return "\n".join([console.export_text().rstrip("\n"), *costs])


def result_line(run_dir: Path) -> str:
    """The results of a complete stage, in one line."""
    return "; ".join(f"{measure.title}: {measure.value}" for measure in headline(read_lineage(run_dir)))


def _cost_line(name: str, run_dir: Path) -> str:
    """The time, peak memory, trained parameters and result folder of a complete stage."""
    lineage = read_lineage(run_dir)
    cost = lineage.cost
    gpu = "peak_gpu_bytes" in cost
    peak = f"{cost['peak_gpu_bytes' if gpu else 'peak_rss_bytes'] / GIB:.2f} GiB of {'GPU ' if gpu else ''}memory"
    trained = f", {cost['trained_parameters']:,} parameters trained" if "trained_parameters" in cost else ""
    return f"{name}: {cost['wall_s']:.0f} s, {peak}{trained}; {run_dir / lineage.kind}"
