"""Rendezvous: the processes of a launch meet and compare what each is about to do, before weights are read."""

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

FOLDER_S = 10  # until another machine's new folder is seen: network file systems cache that it was missing
MEETING_S = 60  # how long a process waits for the others, unless ddp_timeout is shorter
_meetings = itertools.count()


def meet(facts: Mapping[str, Any], *, timeout_s: float) -> list[dict[str, Any]]:
    """Wait for every launched process, compare their `facts`, and return each one's facts by rank.

    `facts` are JSON values by name; those whose name begins with `_` are exchanged but not compared. Raises
    LaunchError, on every process, when one is missing after `timeout_s` seconds (MEETING_S at most), or differs.
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
            f"rank {rank} of {processes} on {mine['_host']} reached nobody at {os.environ.get('MASTER_ADDR')}:"
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
    # Nobody leaves before all have read: the store may live in a process that is about to end. If it is gone (the
    # suppressed RuntimeError), all have read.
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
    """Meet the other processes; all must have the same facts and see the same run directory.

    Returns the checkpoint to resume from, the last complete one in the folder `checkpoints`, or None to start from the
    beginning. Raises LaunchError, on every process, when they differ or the checkpoint is of another layout.
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
    """Check that every process sees `folder`, which the first one has made. Raises LaunchError on all of them."""
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
    """The launch's store. It is kept, since without torchrun its server lives only as long as this object on rank 0."""
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://", timeout=timedelta(seconds=MEETING_S)))[0]


def _store() -> Any:
    """A part of the store for one meeting, apart from earlier ones and from those before a restart of the group."""
    from torch.distributed.distributed_c10d import PrefixStore

    meeting = f"posttrain/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_meetings)}"
    return PrefixStore(meeting, _rendezvous())


def _wait(store: Any, what: str, processes: int, end: float) -> list[int]:
    """The ranks that have not written `what` by the time `end`."""
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
    """A line that says which ranks have which value of a fact; none if it is the same on all."""
    holders: dict[str, list[int]] = {}
    for rank, facts in enumerate(everyone):
        holders.setdefault(json.dumps(facts[name], sort_keys=True), []).append(rank)
    if len(holders) == 1:
        return []
    told = "; ".join(f"{value} on {_ranks(ranks)} ({everyone[ranks[0]]['_host']})" for value, ranks in holders.items())
    return [f"  {name}: {told}"]


def start_process_group(args_timeout_s: float, *, on_cpu: bool) -> None:
    """Start torch.distributed on CPU processes with `ddp_timeout`, which transformers applies on GPUs only."""
    import torch.distributed as dist

    if on_cpu and log.world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=args_timeout_s))
        atexit.register(_leave_process_group)


def _leave_process_group() -> None:
    """End gloo's threads before the interpreter ends, or they sometimes abort a process that has done its work."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
