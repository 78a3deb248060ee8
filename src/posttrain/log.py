"""Lines for people, and which process this is. Imports nothing of ours."""

import os


def say(text: str) -> None:
    """One line for the user, from the first process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)
