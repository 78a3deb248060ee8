"""What a chain's stages have shown, for people: a line of each, and the table at the end. Imports no torch."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..intervals import in_percent
from ..runs.lineage import Lineage, is_complete, read_lineage

if TYPE_CHECKING:
    from .graph import Chain


def closing_table(chain: "Chain", width: int = 160) -> str:
    """Stage, metric before and after and its change, time, peak memory, trained parameters, artifact."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{chain.name}, in {chain.output_dir}", title_justify="left")
    for column in ("stage", "metric", "before", "after", "change", "time", "memory", "trained", "artifact"):
        table.add_column(column, justify="left" if column in ("stage", "metric", "artifact") else "right")
    for stage in chain.stages:
        run_dir = chain.run_dir(stage.name)
        if not is_complete(run_dir):
            table.add_row(stage.name, "not complete")
            continue
        lineage = read_lineage(run_dir)
        cost = lineage.cost
        name, *costs = (
            stage.name,
            f"{cost['wall_s']:.0f} s",
            f"{cost.get('peak_gpu_bytes', cost['peak_rss_bytes']) / 2**30:.2f} GiB",
            f"{cost['trained_parameters']:,}" if "trained_parameters" in cost else "",
            f"{stage.name}/{lineage.kind}",
        )
        for metric in _metric_rows(lineage):
            table.add_row(name, *metric, *costs)
            name, costs = "", []
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115  rich wants an open file
    console.print(table)
    return console.export_text()


def result_line(run_dir: Path) -> str:
    """What a complete stage has shown, in one line."""
    rows = _metric_rows(read_lineage(run_dir))
    return "; ".join(f"{metric}: {after}" for metric, _, after, _ in rows if metric)


def _metric_rows(lineage: Lineage) -> list[tuple[str, str, str, str]]:
    """(metric, before, after, change), each with its interval where it has one."""
    m = lineage.metrics
    rows: list[tuple[str, str, str, str]] = []
    for name in ("greedy", "sampled"):
        if f"{name}_exact" in m.get("after", {}):
            before, after = (in_percent(m.get(when, {}), f"{name}_exact") for when in ("before", "after"))
            rows.append((f"exact match, {name}", before, after, in_percent(m.get("change", {}), f"{name}_exact", "+")))
    if "objective/kl" in m:
        rows.append(("KL from its start, nats a completion", "", f"{m['objective/kl']:.2f}", ""))
    if "held_out_accuracy" in m:
        rows.append((f"accuracy, {m['held_out_pairs']} held-out pairs", "", f"{m['held_out_accuracy']:.1%}", ""))
    if "f1" in m:
        rows.append((f"entity F1, {m['sentences']} sentences", "", f"{m['f1']:.1%}", ""))
    if lineage.kind == "data":
        rows.append((f"pairs from {m['prompts']} prompts", "", str(m["pairs"]), ""))
    return rows or [("", "", "", "")]
