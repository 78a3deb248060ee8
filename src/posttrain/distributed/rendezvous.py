"""The processes of a launch find each other, and compare what each is about to do, before weights are read."""

import atexit
import itertools
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from .. import log
from ..errors import LaunchError
from .checkpoints import check_resumable, last_whole_checkpoint
from .environment import Launch

FOLDER_S = 10  # until a folder that another machine has made is seen: network file systems remember what was not there
MEETING_S = 60  # how long a process waits for the others to come, unless ddp_timeout is shorter
_meetings = itertools.count()


def meet(facts: Mapping[str, Any], *, timeout_s: float) -> list[dict[str, Any]]:
    """Wait for every process that was launched, and compare what each is about to do; each one's facts, by rank.

    `facts` are values of JSON by name; those whose name begins with `_` are passed on and not compared. Raises
    LaunchError, on every process, when one does not come within `timeout_s` seconds (MEETING_S at most), or differs.
    """
    processes, rank = log.world_size(), log.rank()
    mine = {"_host": socket.gethostname(), **facts}
    if processes == 1:
        return [mine]
    limit_s = min(timeout_s, MEETING_S)
    try:
        store = _store()
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"rank {rank} of {processes} on {mine['_host']} met nobody at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} within {MEETING_S} s ({str(error).splitlines()[0]}): is the first "
            "machine's launcher running, is main_process_ip its address, is the port open, were all processes started?"
        ) from error
    store.set(f"here/{rank}", json.dumps(mine))
    missing = _wait(store, "here", processes, time.monotonic() + limit_s)
    if missing:
        raise LaunchError(
            f"{_ranks(missing)} did not come within {limit_s:g} s of rank {rank} on {mine['_host']}: ended early (then "
            "with a message of its own), never started, or still loading its data"
        )
    everyone: list[dict[str, Any]] = [json.loads(store.get(f"here/{other}")) for other in range(processes)]
    # Nobody leaves before all have read: the store may live in a process that is about to end. Then all of them have.
    with suppress(RuntimeError):
        store.set(f"read/{rank}", "")
        _wait(store, "read", processes, time.monotonic() + 5)
    differing = [line for name in facts if not name.startswith("_") for line in _difference(name, everyone)]
    if differing:
        raise LaunchError("the processes are about to do different things:\n" + "\n".join(differing))
    return everyone


def join(
    run_dir: Path, checkpoints: Path, launch: Launch, facts: Mapping[str, Any], *, timeout_s: float = MEETING_S
) -> Path | None:
    """Meet the other processes, which have the same facts and see one run directory with one checkpoint in it.

    Returns the checkpoint to go on from, the last whole one of the folder `checkpoints`; None to begin. Raises
    LaunchError, on every process, when they differ, or the checkpoint is of another layout.
    """
    found = last_whole_checkpoint(checkpoints) if log.is_main() else None
    mine = {"launch": str(launch), **facts, "_checkpoint": str(found) if found else None}
    everyone = meet(mine, timeout_s=timeout_s)
    checkpoint = Path(everyone[0]["_checkpoint"]) if everyone[0]["_checkpoint"] else None
    share_folder(checkpoint or run_dir, timeout_s=timeout_s)
    if checkpoint is not None:
        check_resumable(checkpoint, launch)
    return checkpoint


def share_folder(folder: Path, *, timeout_s: float) -> None:
    """Each process sees `folder`, which the first one has made. Raises LaunchError on all of them otherwise."""
    end = time.monotonic() + FOLDER_S
    while not folder.is_dir() and time.monotonic() < end:
        time.sleep(0.2)
    everyone = meet({"_sees": folder.is_dir()}, timeout_s=timeout_s)
    absent = dict.fromkeys(facts["_host"] for facts in everyone if not facts["_sees"])
    if absent:
        raise LaunchError(
            f"output_dir: {folder} is not there on {', '.join(absent)}; all machines must share the file system that "
            "output_dir is on"
        )


@cache
def _rendezvous() -> Any:
    """The launch's store, kept: without torch's launcher, its server lives as long as this object on rank 0."""
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://", timeout=timedelta(seconds=MEETING_S)))[0]


def _store() -> Any:
    """A part of the store for one meeting, not of an earlier one of this process, nor of a group that was restarted."""
    from torch.distributed.distributed_c10d import PrefixStore

    meeting = f"posttrain/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_meetings)}"
    return PrefixStore(meeting, _rendezvous())


def _wait(store: Any, what: str, processes: int, end: float) -> list[int]:
    """The ranks that have not written `what` when the time is up."""
    missing = list(range(processes))
    while missing:
        missing = [rank for rank in missing if not store.check([f"{what}/{rank}"])]
        if not missing or time.monotonic() > end:
            break
        time.sleep(0.05)
    return missing


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _difference(name: str, everyone: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line on a fact that is not the same everywhere, with who has which value."""
    holders: dict[str, list[int]] = {}
    for rank, facts in enumerate(everyone):
        holders.setdefault(json.dumps(facts[name], sort_keys=True), []).append(rank)
    if len(holders) == 1:
        return []
    told = "; ".join(f"{value} on {_ranks(ranks)} ({everyone[ranks[0]]['_host']})" for value, ranks in holders.items())
    return [f"  {name}: {told}"]


def start_process_group(args_timeout_s: float, *, on_cpu: bool) -> None:
    """Begin torch.distributed on CPU processes with `ddp_timeout`, which transformers passes on for GPUs only."""
    import torch.distributed as dist

    if on_cpu and log.world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=args_timeout_s))
        atexit.register(_leave_process_group)


def _leave_process_group() -> None:
    """gloo's threads end before the interpreter does, or now and then they abort a process that has done its work."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
