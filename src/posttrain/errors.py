"""The errors that a user can cause, each a sentence that says what to change.

The command line and the recipes print these without a traceback and leave with `EXIT_USER_ERROR`; anything else is a
bug and keeps its traceback.

A launcher between a process and whoever started it makes every failure an exit code 1. So a run that is given a folder
for it (`POSTTRAIN_STATE`) also leaves there what it ended with: a file `exit-CODE.rank-RANK` with the message.
"""

import errno
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from .log import rank, world_size

EXIT_BUG, EXIT_USER_ERROR, EXIT_UNREACHABLE, EXIT_STOPPED = 1, 2, 75, 85
STATE = "POSTTRAIN_STATE"


class PosttrainError(Exception):
    """Base of every error that is the user's to mend."""

    exit_code = EXIT_USER_ERROR


class ConfigError(PosttrainError):
    """A key, a type or a value in a configuration file or on the command line."""


class DataError(PosttrainError):
    """A file, a row or a field of the training data."""


class ArtifactError(PosttrainError):
    """A run directory, a model or an adapter that is missing, altered, or made for something else."""


class LaunchError(PosttrainError):
    """A process that was not started as it was asked for, or a disk that cannot take the result."""


class GateError(PosttrainError):
    """A stage that ran, and did not prove what the next stage relies on."""


class UnreachableError(PosttrainError):
    """A node that does not answer: nothing to mend in the configuration, so that another start may go well."""

    exit_code = EXIT_UNREACHABLE


class StoppedError(PosttrainError):
    """Not a failure: a run that was asked to stop, and left a checkpoint to go on from."""

    exit_code = EXIT_STOPPED


def run_main(main: Callable[[], None]) -> None:
    """Run `main`, and turn a user's mistake into one message on stderr and its exit code.

    So is what one of several processes sees of another one's end: a message, rather than a traceback or silence.
    """
    if world_size() > 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _told_to_end)
    try:
        main()
    except PosttrainError as error:
        _leave(error)
    except Exception as error:
        if _others_are_gone(error):
            lost = LaunchError(f"{_rank()} has lost the others: {str(error).splitlines()[0]}. {_LOST}")
            lost.exit_code = EXIT_UNREACHABLE  # no mistake: another start may go well
            _leave(lost)
        if not _disk_is_full(error):
            _record(EXIT_BUG, f"{type(error).__name__}: {error}")
            raise
        where = getattr(error, "filename", None) or "in a save"
        _leave(
            LaunchError(
                f"no space left on the device ({where}). "
                "Whole checkpoints are kept: free some space, then run the same command again to go on from there."
            )
        )


_LOST = (
    "Another process ended (its own message says why), stands still, or its machine is out of reach. "
    "Whole checkpoints are kept: run the same command again to go on from there."
)

_LOST_WORDS = ("gloo", "NCCL", "ncclRemoteError", "Connection closed by peer", "Connection reset by peer")


def _rank() -> str:
    return f"rank {rank()} of {world_size()}"


def _others_are_gone(error: BaseException) -> bool:
    """Whether an error comes from the connection between processes: torch has several classes for it, and gloo none."""
    if world_size() == 1:
        return False
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & {"DistBackendError", "DistNetworkError", "DistStoreError"}:
        return True
    return "RuntimeError" in names and any(word in str(error) for word in _LOST_WORDS)


def _told_to_end(signum: int, frame: object) -> NoReturn:
    """SIGTERM from the launcher, which ends the others when one process has failed, or from the cluster.

    Leaves at once: an orderly end would wait for processes that are gone. Files are whole at any moment.
    """
    text = f"LaunchError: {_rank()} was told to end (SIGTERM). {_LOST}\n"
    os.write(sys.stderr.fileno(), text.encode())
    os._exit(128 + signum)


def _leave(error: PosttrainError) -> NoReturn:
    message = f"{type(error).__name__}: {error}"
    print(message, file=sys.stderr, flush=True)
    _record(error.exit_code, message)
    sys.exit(error.exit_code)


def _record(code: int, message: str) -> None:
    """Leave exit code and message where the job looks for them; on a full disk at least the file's name."""
    if STATE not in os.environ:
        return
    # A node's roll call has no rank yet.
    mine = rank() if "RANK" in os.environ else int(os.environ.get("SLURM_NODEID", "0"))
    record = {"rank": mine, "node": socket.gethostname(), "time": time.time(), "message": message}
    try:
        with open(os.path.join(os.environ[STATE], f"exit-{code}.rank-{mine}"), "w", encoding="utf-8") as file:
            json.dump(record, file)
    except OSError as error:
        print(f"{os.environ[STATE]}: {error}", file=sys.stderr, flush=True)


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether ENOSPC is behind an error. safetensors and torch.save report it in words only, each in its own class."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return True
        if "No space left on device" in str(error) or "PytorchStreamWriter failed writing" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def as_config_errors() -> Iterator[None]:
    """What a library refuses with a ValueError is the user's to change: exit code 2, and no traceback."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error
