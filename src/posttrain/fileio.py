"""Files written whole or not at all, read line by line, and hashed. Imports no torch."""

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

GIB = 2**30  # bytes


def digest(material: Any) -> str:
    """SHA-256 over the canonical JSON of `material`, in hexadecimal."""
    text = json.dumps(material, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def lines_of(text: str) -> list[str]:
    """Split at line feeds only: `splitlines` also splits at U+2028 and others, which JSON leaves in its strings."""
    return text.removesuffix("\n").split("\n") if text else []


def write_atomically(path: Path, text: str) -> None:
    """Write and flush a temporary file, then rename it: a reader sees the old file or the new one, never a part."""
    # Processes of several machines may have the same id.
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# Fingerprints


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()
