"""A stage's key: a hash of everything that changes its result, and of nothing else.

It hashes the effective configuration, the content of data and base, the keys of the parents, and the versions of the
libraries. Moving a file keeps the key; changing a byte changes it. Imports no torch, so that planning is fast.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.stage_config import StageConfig
from ..data.files import list_files, parse_sources
from ..fileio import digest, sha256_file
from .fingerprints import fingerprint_base
from .lineage import versions

FILE_KEYS = ("train_file", "validation_file", "test_file")
KEYED_VERSIONS = ("posttrain", "torch", "transformers", "trl", "peft")


def stage_key(config: StageConfig, parent_keys: Mapping[str, str]) -> str:
    """The key of a stage, given the keys of its inputs (role -> key). Raises DataError for a missing file."""
    material: dict[str, Any] = dict(config.key_material())
    for key in FILE_KEYS:
        if material.get(key):
            material[key] = [
                [weight, *(sha256_file(f) for f in ([path] if path.is_file() else list_files(path, key)))]
                for path, weight in parse_sources(material[key], key)
            ]
    base = str(material.get("model_name_or_path") or "")
    if (Path(base) / "config.json").is_file():
        material["model_name_or_path"] = fingerprint_base(Path(base))
    installed = versions()
    return digest(
        {
            "config": material,
            "parents": dict(sorted(parent_keys.items())),
            "versions": {name: installed[name] for name in KEYED_VERSIONS},
        }
    )
