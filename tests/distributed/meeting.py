"""Rendezvous of two processes without launcher or model, which agree, differ, and miss each other. Prints results."""

import os
import sys
import time

from posttrain.distributed.rendezvous import meet
from posttrain.errors import LaunchError

rank = int(os.environ["RANK"])


def log_line(text: str) -> None:
    print(f"rank {rank}: {text}", flush=True)


log_line(f"met {[facts['_who'] for facts in meet({'seed': 1, '_who': rank}, timeout_s=30)]}")
try:
    meet({"seed": rank}, timeout_s=30)
except LaunchError as error:
    log_line(" ".join(str(error).split()))
if rank == 1:
    time.sleep(4)  # the store lives in rank 0
    sys.exit()
begun = time.monotonic()
try:
    meet({"seed": 1}, timeout_s=2)
except LaunchError as error:
    log_line(f"{error}; after {time.monotonic() - begun:.0f} s")
