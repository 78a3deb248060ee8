"""Identity and completeness of weight files, from headers and samples. Imports no torch."""

import hashlib
import json
from pathlib import Path

from ..errors import ArtifactError


def fingerprint_base(model_dir: Path) -> str:
    """A base model's identity without reading all of it: its config; size, header and two samples per weight file.

    A 70B base must be recognised in a second. The safetensors header holds every name, shape and offset; the first and
    last MiB of the weights change with any retraining.
    """
    digest = hashlib.sha256((model_dir / "config.json").read_bytes())
    for path in sorted(model_dir.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(length, size)))
            digest.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read(2**20))
    return digest.hexdigest()


def check_safetensors(path: Path) -> None:
    """Refuse a truncated or foreign file by its header alone. Raises ArtifactError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > size - 8:
            raise ArtifactError(f"{path} is truncated ({size} bytes): copy or download it again")
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path} is not a safetensors file") from error
    expected = 8 + length + max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
    if size != expected:
        raise ArtifactError(f"{path} is truncated: {size} bytes of {expected}; copy or download it again")
