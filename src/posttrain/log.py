"""Lines printed for people, and the rank of this process. Imports no other module of posttrain."""

import os


def rank() -> int:
    """The rank of this process, as the launcher set it; 0 for a single process."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes of this launch, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """The rank of this process on its machine, which is also the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this is rank 0, which prints and writes the run directory."""
    return rank() == 0


def log_line(text: str) -> None:
    """Print one line for the user, from the main process only."""
    if is_main():
        print(text, flush=True)
