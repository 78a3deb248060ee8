"""Where the demos find files of PyPI packages, and cache what they make from them."""

import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path

from ..errors import ArtifactError

CACHE = Path(os.environ.get("POSTTRAIN_CACHE", "~/.cache/posttrain")).expanduser()
Log = Callable[[str], None]


def package_folder(distribution: str, folder: str) -> Path:
    """The folder of an installed package, found without importing it. Raises ArtifactError."""
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise ArtifactError(f"the demo needs the package {distribution}: run `make setup`") from error
    return Path(str(found.locate_file(folder)))
