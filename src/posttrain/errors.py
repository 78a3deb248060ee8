"""The errors that a user can cause. Each message says what to change.

The command line and the recipes print these without a traceback and exit with `EXIT_USER_ERROR`; any other exception is
a bug and keeps its traceback.

A launcher between a process and its caller turns every failure into exit code 1. So a run that is given a state folder
(`POSTTRAIN_STATE`) also writes its exit code and message there, as a file `exit-CODE.rank-RANK`.
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
    """Base of every error that the user can fix."""

    exit_code = EXIT_USER_ERROR


class ConfigError(PosttrainError):
    """A key, a type or a value in a configuration file or on the command line."""


class DataError(PosttrainError):
    """A file, a row or a field of the training data."""


class ArtifactError(PosttrainError):
    """A run directory, a model or an adapter that is missing, altered, or made for something else."""


class LaunchError(PosttrainError):
    """A process that was not started as requested, or a disk that is full."""


class GateError(PosttrainError):
    """A stage that ran, but failed a check that the next stage relies on."""


class UnreachableError(PosttrainError):
    """A node that does not answer. The configuration is not at fault, so another start may succeed."""

    exit_code = EXIT_UNREACHABLE


class StoppedError(PosttrainError):
    """Not a failure: a run was asked to stop, and saved a checkpoint to resume from."""

    exit_code = EXIT_STOPPED


def run_main(main: Callable[[], None]) -> None:
    """Run `main`, and turn a user's mistake into one message on stderr and its exit code.

    If one of several processes ends, the others print a message too, rather than a traceback or nothing.
    """
    if world_size() > 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _told_to_end)
    try:
        main()
    except PosttrainError as error:
        _leave(error)
    except Exception as error:
        if _others_are_gone(error):
            lost = LaunchError(
                f"{_rank()} has lost the connection to the others: {str(error).splitlines()[0]}. {_LOST}"
            )
            lost.exit_code = EXIT_UNREACHABLE  # not a mistake: another start may succeed
            _leave(lost)
        if not _disk_is_full(error):
            _record(EXIT_BUG, f"{type(error).__name__}: {error}")
            raise
        where = getattr(error, "filename", None) or "in a save"
        _leave(
            LaunchError(
                f"no space left on the device ({where}). "
                "Complete checkpoints are kept: free some space, then run the same command again to resume."
            )
        )


_LOST = (
    "Another process ended (its own message says why) or hangs, or its machine cannot be reached. "
    "Complete checkpoints are kept: run the same command again to resume."
)

_LOST_WORDS = ("gloo", "NCCL", "ncclRemoteError", "Connection closed by peer", "Connection reset by peer")


def _rank() -> str:
    return f"rank {rank()} of {world_size()}"


def _others_are_gone(error: BaseException) -> bool:
    """Whether an error comes from the connection between processes: torch has several classes for it, gloo has none."""
    if world_size() == 1:
        return False
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & {"DistBackendError", "DistNetworkError", "DistStoreError"}:
        return True
    return "RuntimeError" in names and any(word in str(error) for word in _LOST_WORDS)


def _told_to_end(signum: int, frame: object) -> NoReturn:
    """Handle SIGTERM, sent by the cluster, or by the launcher when another process has failed.

    Exits at once: an orderly end would wait for processes that are gone. No file is ever half written.
    """
    text = f"LaunchError: {_rank()} was terminated (SIGTERM). {_LOST}\n"
    os.write(sys.stderr.fileno(), text.encode())
    os._exit(128 + signum)


def _leave(error: PosttrainError) -> NoReturn:
    message = f"{type(error).__name__}: {error}"
    print(message, file=sys.stderr, flush=True)
    _record(error.exit_code, message)
    sys.exit(error.exit_code)


def _record(code: int, message: str) -> None:
    """Write exit code and message where the job looks for them; on a full disk the file may be empty."""
    if STATE not in os.environ:
        return
    # During a node's roll call (launch/preflight.py) there is no rank yet.
    mine = rank() if "RANK" in os.environ else int(os.environ.get("SLURM_NODEID", "0"))
    record = {"rank": mine, "node": socket.gethostname(), "time": time.time(), "message": message}
    try:
        with open(os.path.join(os.environ[STATE], f"exit-{code}.rank-{mine}"), "w", encoding="utf-8") as file:
            json.dump(record, file)
    except OSError as error:
        print(f"{os.environ[STATE]}: {error}", file=sys.stderr, flush=True)


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether an error was caused by ENOSPC. safetensors and torch.save tell it in the message only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return True
        if "No space left on device" in str(error) or "PytorchStreamWriter failed writing" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def as_config_errors() -> Iterator[None]:
    """Raise a library's ValueError as ConfigError: exit code 2, no traceback."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error
