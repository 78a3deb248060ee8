"""The errors that a user can cause, each a sentence that says what to change.

The command line and the recipes print these without a traceback and leave with `EXIT_USER_ERROR`; anything else is a
bug and keeps its traceback.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

EXIT_USER_ERROR = 2


class PosttrainError(Exception):
    """Base of every error that is the user's to mend."""


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


def run_main(main: Callable[[], None]) -> None:
    """Run `main`, and turn a user's mistake into one message on stderr and exit code 2.

    So is what one of several processes sees of another one's end: a message, rather than a traceback or silence.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _told_to_end)
    try:
        main()
    except PosttrainError as error:
        _leave(error)
    except Exception as error:
        if _others_are_gone(error):
            _leave(LaunchError(f"{_rank()} has lost the others: {str(error).splitlines()[0]}. {_LOST}"))
        if not _disk_is_full(error):
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
    return f"rank {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}"


def _others_are_gone(error: BaseException) -> bool:
    """Whether an error comes from the connection between processes: torch has several classes for it, and gloo none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
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
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    sys.exit(EXIT_USER_ERROR)


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
