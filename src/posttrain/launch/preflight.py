"""Checks that all nodes and ranks reach each other before a model is loaded; missing ones are named.

`roll_call` (`python -m posttrain.launch.preflight` on each node, before accelerate) uses plain sockets: torch's
rendezvous waits ten minutes, and does not say for which node. `all_reduce` (each rank, when a stage opens) runs a real
collective on the network that training will use: with a wrong interface the first check passes and the second fails.
Both raise UnreachableError. Bandwidth is not measured.
"""

import argparse
import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

from .. import log
from ..errors import UnreachableError, run_main

NODES = "POSTTRAIN_NODES"  # the nodes' names in the order of their ranks, separated by commas
COLLECTIVE_S = 120  # the first all-reduce takes a second or two, with NCCL on many nodes a few more


# The roll call of nodes, without torch


def roll_call(nodes: Sequence[str], rank: int, port: int, *, wait_s: float) -> float:
    """Every node reports to the first one; returns the seconds until all have.

    Raises UnreachableError on each node that takes part, with the names of those that do not.
    """
    begun = time.monotonic()
    end = begun + wait_s
    missing = _gather(nodes, port, end) if rank == 0 else _report(nodes, rank, port, end)
    if missing:
        raise UnreachableError(
            f"{', '.join(missing)} of the nodes {', '.join(nodes)} did not answer within {wait_s:.0f} s at "
            f"{nodes[0]}:{port}; look at `scontrol show node {missing[0]}`, and whether a firewall is between them"
        )
    return time.monotonic() - begun


def _gather(nodes: Sequence[str], port: int, end: float) -> list[str]:
    """On the first node: wait for all others, then tell each which ones are missing."""
    here: dict[int, socket.socket] = {}
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("", port), backlog=len(nodes)))
        while len(here) < len(nodes) - 1 and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                peer, _ = server.accept()
                stack.enter_context(peer)
                peer.settimeout(5)
                said = json.loads(peer.makefile().readline())
                if said["nodes"] == list(nodes):  # not another program, or an earlier job
                    here[int(said["rank"])] = peer
            except (OSError, ValueError, KeyError, TypeError):
                continue
        missing = [node for rank, node in enumerate(nodes) if rank not in here and rank != 0]
        for peer in here.values():
            try:
                peer.sendall(json.dumps(missing).encode() + b"\n")
            except OSError:
                continue  # that node reports its own error
    return missing


def _report(nodes: Sequence[str], rank: int, port: int, end: float) -> list[str]:
    """On any other node: report to the first one, and receive which ones are missing."""
    hello = json.dumps({"rank": rank, "nodes": list(nodes)}).encode() + b"\n"
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((nodes[0], port), timeout=min(left, 5)) as peer:
                peer.sendall(hello)
                peer.settimeout(left + 10)
                if answer := peer.makefile().readline():
                    missing: list[str] = json.loads(answer)
                    return missing
        except OSError:
            pass  # not up yet
        time.sleep(min(0.1, max(0.0, end - time.monotonic())))
    return [nodes[0]]


# The all-reduce of ranks


def num_nodes() -> int:
    """The number of machines of this launch, as torch's launcher set it."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def all_reduce(*, wait_s: float = COLLECTIVE_S) -> float:
    """Sum a number over all ranks in a temporary process group; returns the seconds that it took.

    Raises UnreachableError with the nodes of the ranks that are missing or cannot be reached.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    begun = time.monotonic()
    rank, size = log.rank(), log.world_size()
    cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU") != "true"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    timeout = timedelta(seconds=wait_s)
    try:
        server = TCPStore(address, port, None, rank == 0 and not agent_has_store, timeout)
    except dist.DistStoreError as error:
        raise UnreachableError(f"{address}:{port}, where rank 0 is, does not answer ({_first_line(error)})") from error
    store = PrefixStore(f"preflight-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", server)
    store.set(f"here/{rank}", socket.gethostname())
    try:
        store.wait([f"here/{other}" for other in range(size)], timeout)
        if cuda:
            torch.cuda.set_device(log.local_rank())
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=timeout)
        total = torch.ones(1, device="cuda" if cuda else "cpu")
        dist.all_reduce(total)
        found = int(total)
        store.set(f"done/{rank}", "1")
        store.wait(
            [f"done/{other}" for other in range(size)], timeout
        )  # so that no rank leaves while another still reduces
    except RuntimeError as error:  # a timeout, or an error of gloo or NCCL
        raise UnreachableError(f"all-reduce over {size} ranks: {_who(store, size)} ({_first_line(error)})") from error
    if found != size:
        raise UnreachableError(f"all-reduce over {size} ranks: the sum of ones is {found}")
    dist.destroy_process_group()
    return time.monotonic() - begun


def _who(store: Any, size: int) -> str:
    """Which ranks are missing, and on which nodes they should be."""
    try:
        names = {rank: store.get(f"here/{rank}").decode() for rank in range(size) if store.check([f"here/{rank}"])}
    except RuntimeError:
        return f"{os.environ['MASTER_ADDR']}, where rank 0 is, no longer answers"
    absent = [rank for rank in range(size) if rank not in names]
    here = ", ".join(dict.fromkeys(names.values()))
    if not absent:
        return f"all have started, on {here}, but cannot reach each other: are NCCL_ and GLOO_SOCKET_IFNAME right?"
    nodes = os.environ.get(NODES, "").split(",")
    places = [rank // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) for rank in absent]
    where = dict.fromkeys(nodes[place] if place < len(nodes) else f"machine {place}" for place in places)
    return f"{', '.join(where)} did not answer (rank {', '.join(map(str, absent))}); those that did are on {here}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", required=True, help="their names, separated by commas")
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--wait_s", required=True, type=float)
    arguments = parser.parse_args()
    nodes, rank = arguments.nodes.split(","), int(os.environ["SLURM_NODEID"])
    took = roll_call(nodes, rank, arguments.port, wait_s=arguments.wait_s)
    print(f"roll call: all {len(nodes)} nodes within {took:.2f} s", flush=True)


if __name__ == "__main__":
    run_main(main)
