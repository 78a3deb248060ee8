"""Lines for people, and which of a launch's processes this is. Imports nothing of ours."""

import os


def rank() -> int:
    """The number of this process among those that were launched together, as the launcher set it; 0 when alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes were launched together, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """The number of this process among those of its machine, and so of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that prints, and writes the run directory."""
    return rank() == 0


def log_line(text: str) -> None:
    """Print one line for the user, from the main process only."""
    if is_main():
        print(text, flush=True)
