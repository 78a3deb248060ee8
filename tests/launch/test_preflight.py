"""Real sockets and a real all-reduce between processes of this machine, one of which may be missing."""

import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from posttrain.errors import EXIT_UNREACHABLE, UnreachableError
from posttrain.launch.preflight import roll_call

NODES = ["localhost", "n2", "n3"]


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def call(ranks, *, wait_s):
    """Run the roll call of these ranks, each in a thread; return what each returned or raised."""
    port, results = free_port(), {}

    def answer(rank):
        try:
            results[rank] = roll_call(NODES, rank, port, wait_s=wait_s)
        except UnreachableError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=answer, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(30)
    return results


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_all_nodes_answer_in_any_order_of_start(order):
    results = call(order, wait_s=20)
    assert sorted(results) == [0, 1, 2]
    assert all(isinstance(took, float) and took < 20 for took in results.values())


def test_every_node_is_told_which_nodes_are_missing():
    results = call((0, 2), wait_s=1)
    assert sorted(results) == [0, 2]
    assert all(
        said.startswith("n2 of the nodes localhost, n2, n3 did not answer within 1 s") for said in results.values()
    )


def test_a_missing_first_node_is_named():
    results = call((1, 2), wait_s=0.5)
    assert all(said.startswith("localhost of the nodes") for said in results.values())
    assert len(results) == 2


def test_a_foreign_connection_is_not_counted():
    port = free_port()
    errors = []

    def first():
        try:
            roll_call(NODES[:2], 0, port, wait_s=1.5)
        except UnreachableError as error:
            errors.append(str(error))

    thread = threading.Thread(target=first)
    thread.start()
    for hello in (b"GET / HTTP/1.1\r\n\r\n", b'{"rank": 1, "nodes": ["a", "b"]}\n', b"[1]\n"):
        for _ in range(50):
            try:
                with socket.create_connection(("localhost", port), timeout=1) as peer:
                    peer.sendall(hello)
                break
            except OSError:
                time.sleep(0.02)
    thread.join(20)
    assert errors and errors[0].startswith("n2 of the nodes")


REDUCE = """
import os, sys
from posttrain.errors import run_main
from posttrain.launch.preflight import all_reduce

def main():
    if sys.argv[1] == "absent":
        return
    all_reduce(wait_s=float(sys.argv[2]))
    import torch.distributed as dist
    dist.init_process_group("gloo")  # what training does next, with the same address
    import torch
    ones = torch.ones(1)
    dist.all_reduce(ones)
    print("sum", int(ones))
    dist.destroy_process_group()  # gloo's threads may abort an interpreter that ends before them

run_main(main)
"""


def start_ranks(tmp_path, *, absent=(), wait_s):
    port = free_port()
    common = {
        **os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1",
        "LOCAL_RANK": "0", "POSTTRAIN_NODES": "n1,n2", "POSTTRAIN_STATE": str(tmp_path), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-c", REDUCE, "absent" if rank in absent else "here", str(wait_s)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**common, "RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip


def test_a_process_group_can_be_made_after_the_all_reduce(tmp_path):
    ranks = start_ranks(tmp_path, wait_s=120)
    for rank in ranks:
        out, err = rank.communicate(timeout=180)
        assert rank.returncode == 0, err
        assert "sum 2" in out
    assert list(tmp_path.iterdir()) == []


def test_a_missing_rank_is_named_with_its_node(tmp_path):
    ranks = start_ranks(tmp_path, absent=(1,), wait_s=3)
    _, err = ranks[0].communicate(timeout=180)
    ranks[1].communicate(timeout=180)
    assert ranks[0].returncode == EXIT_UNREACHABLE
    assert "UnreachableError: all-reduce over 2 ranks: n2 did not answer (rank 1)" in err
    assert "Traceback" not in err
    # The job finds the exit file here and starts again, since the configuration is not at fault.
    assert [path.name for path in tmp_path.iterdir()] == [f"exit-{EXIT_UNREACHABLE}.rank-0"]
