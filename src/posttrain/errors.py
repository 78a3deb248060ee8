"""The errors that a user can cause, each a sentence that says what to change.

The command line and the recipes print these without a traceback and leave with `EXIT_USER_ERROR`; anything else is a
bug and keeps its traceback.
"""

import sys
from collections.abc import Callable

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
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:
        # errno 28: the disk is full. The message names the file, what is kept, and how to go on.
        if error.errno != 28:
            raise
        print(
            f"LaunchError: no space left on the device while writing {error.filename or 'the run directory'}. "
            "Finished checkpoints are kept; free some space or change output_dir, then run the same command again.",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(EXIT_USER_ERROR)
