"""The state of a submitted chain, from Slurm and from the files of its stages. Needs no accounting database.

`posttrain status chain.yaml` prints a table of the stages, and for each failed stage the end of the log of the
first rank to fail.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EXIT_STOPPED
from ..launch import slurm
from ..launch.exit_files import read_reports
from ..launch.slurm import JobInfo
from ..runs.lineage import is_complete, read_lineage
from ..runs.paths import METRICS
from .graph import Chain, ChainStage
from .slurm_jobs import read_jobs, state_of

TAIL = 12  # lines of the failing rank's log

_WAITS = {
    "Priority": "other jobs have priority",
    "Resources": "no node is free",
    "BeginTime": "starts again shortly",
    "None": "starts shortly",
    "JobHeldUser": "held: `scontrol release` it",
    "JobHeldAdmin": "held by an administrator",
}


@dataclass(frozen=True)
class StageStatus:
    """One line of the table, and the lines below the table."""

    name: str
    state: str
    job: str = ""
    nodes: str = ""
    restarts: str = ""
    step: str = ""
    loss: str = ""
    left: str = ""
    why: str = ""
    tail: tuple[str, ...] = ()  # the name of the failing rank's log, and its last lines


def status(chain: Chain) -> str:
    """The table as text. Raises LaunchError if Slurm does not answer."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = collect(chain)
    table = Table(title=f"{chain.name}, in {chain.output_dir}", title_justify="left")
    for column in ("stage", "state", "job", "nodes", "restarts", "step", "loss", "left", "why"):
        table.add_column(column, overflow="fold")
    for row in rows:
        cells = (row.name, row.state, row.job, row.nodes, row.restarts, row.step, row.loss, row.left, row.why)
        table.add_row(*(Text(cell) for cell in cells))
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return "\n".join([capture.get().rstrip(), *(line for row in rows for line in row.tail)])


def collect(chain: Chain) -> list[StageStatus]:
    """The status of every stage, in the chain's order."""
    recorded = read_jobs(chain)
    infos = {stage.name: _find(chain, stage, recorded.get(stage.name)) for stage in chain.stages}
    rows: list[StageStatus] = []
    for stage in chain.stages:
        rows.append(_stage(chain, stage, infos[stage.name], recorded.get(stage.name), {r.name: r for r in rows}))
    return rows


def _find(chain: Chain, stage: ChainStage, job_id: str | None) -> JobInfo | None:
    info = slurm.show(job_id) if job_id is not None else None
    return info if info is not None and slurm.is_of(info, chain.run_dir(stage.name).resolve()) else None


def _stage(
    chain: Chain, stage: ChainStage, info: JobInfo | None, job_id: str | None, earlier: dict[str, StageStatus]
) -> StageStatus:
    run_dir, state = chain.run_dir(stage.name), state_of(chain, stage.name)
    last = _last_metrics(run_dir / METRICS)
    shown: dict[str, Any] = {"job": job_id or "", "step": _step(last), "loss": _number(last, "train/loss")}
    if info is not None:
        shown |= {"nodes": info.nodes, "restarts": _restarts(info, state)}
    if is_complete(run_dir):
        lineage = read_lineage(run_dir)
        return StageStatus(stage.name, "complete", why=f"in {lineage.cost['wall_s']:.0f} s, last start", **shown)
    if job_id is None:
        return StageStatus(stage.name, "not submitted", **shown)
    if info is None:
        why = f"job {job_id} is no longer known to Slurm; submit again to continue"
        return StageStatus(stage.name, "unknown", why=why, **shown)
    if info.state == "RUNNING":
        left = f"{last['left_s']:.0f} s" if last.get("left_s") else ""
        return StageStatus(stage.name, "running", left=left, why=f"{info.run_time} of {info.time_limit}", **shown)
    if info.alive:
        return StageStatus(stage.name, info.state.lower(), why=_why_waiting(stage, info, earlier), **shown)
    why, tail = _why_ended(stage, info, state, earlier)
    return StageStatus(stage.name, info.state.lower(), why=why, tail=tail, **shown)


def _why_waiting(stage: ChainStage, info: JobInfo, earlier: dict[str, StageStatus]) -> str:
    if info.reason == "Dependency":
        waits = [p for p in dict.fromkeys(stage.parents.values()) if earlier[p].state != "complete"]
        return f"waits for {', '.join(waits)}" if waits else f"waits for {info.dependency}"
    return _WAITS.get(info.reason, info.reason.replace("_", " "))


def _why_ended(
    stage: ChainStage, info: JobInfo, state: Path, earlier: dict[str, StageStatus]
) -> tuple[str, tuple[str, ...]]:
    """Why a job without a result has ended, in one line, and the last lines of the log that shows it."""
    failed = [p for p in dict.fromkeys(stage.parents.values()) if earlier[p].state not in ("complete", "running")]
    if info.state == "CANCELLED":
        return (f"its input {failed[0]} ended as {earlier[failed[0]].state}" if failed else "was cancelled"), ()
    reports = [r for r in read_reports(state) if r["code"] != EXIT_STOPPED]
    failures = _failures(state)
    again = f"; {failures} failures" if failures > 1 else ""
    if reports:
        first = reports[0]
        why = f"rank {first['rank']} on {first['node']}: {first['message'].splitlines()[0] or '(the disk is full?)'}"
        return why + again, _tail(state / f"rank-{first['rank']}.log")
    rank = _elastic_root_cause(state)
    if rank is not None:
        return f"rank {rank} was killed from outside, exit code {info.exit_code}{again}", _tail(
            state / f"rank-{rank}.log"
        )
    if info.state == "TIMEOUT":
        return f"it reached its time limit, {info.time_limit}, before it could stop{again}", _tail(state / "job.log")
    if info.exit_code == "0:53":
        return f"Slurm could not open the job's log: can all nodes see {state}?", ()
    return f"exit code {info.exit_code}{again}", _tail(state / "job.log")


def _elastic_root_cause(state: Path) -> int | None:
    """The first rank to fail in the last start, over all nodes, as torch's launcher names it in the nodes' logs."""
    found = []
    for path in state.glob("node-*.log"):
        text = path.read_text(encoding="utf-8", errors="replace").rpartition("\n== node ")[2]
        for cause in re.finditer(r"Root Cause.*?time\s*:\s*(\S+).*?rank\s*:\s*(\d+)", text, re.DOTALL):
            found.append((cause[1], int(cause[2])))
    return min(found)[1] if found else None


def _tail(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
    return (f"-- {path}", *(f"   {line}" for line in lines))


def _restarts(info: JobInfo, state: Path) -> str:
    """The number of restarts, by reason."""
    if not info.restarts:
        return "0"
    failures = min(_failures(state), info.restarts)
    return f"{info.restarts} ({info.restarts - failures} preempted or node lost, {failures} failed)"


def _failures(state: Path) -> int:
    path = state / "failures"
    return int(path.read_text() or 0) if path.is_file() else 0


def _last_metrics(path: Path) -> dict[str, Any]:
    """The latest value of each metric in metrics.jsonl; {} if there is none yet."""
    if not path.is_file():
        return {}
    last: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines()[-50:]:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line that is being written
        last = {**last, **record}
    return last


def _step(last: dict[str, Any]) -> str:
    """STEP/MAX_STEPS; empty for a stage that does not train, whose record has no max_steps."""
    return f"{last['step']}/{last['max_steps']}" if "max_steps" in last else ""


def _number(last: dict[str, Any], key: str) -> str:
    return f"{float(last[key]):.4g}" if key in last else ""
