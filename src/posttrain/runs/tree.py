"""What a run was made from, as indented lines: `posttrain lineage DIR`. Imports no torch."""

from pathlib import Path

from .headline import headline
from .lineage import read_lineage, resolve_parent


def tree(run_dir: Path, *, role: str = "", depth: int = 0) -> list[str]:
    """The lines of `posttrain lineage DIR`: the run, and its parents indented below it."""
    lineage = read_lineage(run_dir)
    measured = "; ".join(f"{m.title}: {m.value}" for m in headline(lineage))
    label = f"{role}: " if role else ""
    lines = ["  " * depth + f"{label}{lineage.stage} [{lineage.recipe}] {run_dir}  key {lineage.key[:12]}"]
    details = [f"{lineage.kind} {lineage.digest[:12]}", f"seed {lineage.seed}", measured]
    lines.append("  " * depth + "  " + "; ".join(d for d in details if d))
    for parent_role, parent in lineage.parents.items():
        lines += tree(resolve_parent(run_dir, parent["path"]), role=parent_role, depth=depth + 1)
    if not lineage.parents and lineage.base:
        lines.append("  " * (depth + 1) + f"base: {lineage.base['name']}  {lineage.base['fingerprint'][:12]}")
    return lines
