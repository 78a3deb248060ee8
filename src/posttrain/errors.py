"""The errors that a user can cause, each a sentence that says what to change.

The command line and the recipes print these without a traceback and leave with `EXIT_USER_ERROR`; anything else is a
bug and keeps its traceback.
"""

import errno
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
    """Run `main`, and turn a user's mistake into one message on stderr and exit code 2."""
    try:
        main()
    except PosttrainError as error:
        _leave(error)
    except Exception as error:
        if not _disk_is_full(error):
            raise
        where = getattr(error, "filename", None) or "in a save"
        _leave(
            LaunchError(
                f"no space left on the device ({where}). "
                "Whole checkpoints are kept: free some space, then run the same command again to go on from there."
            )
        )


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
