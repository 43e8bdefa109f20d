"""What a measurement depends on beside its request: the code that made it, and the images that lay at a place."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

import pipeline
from pipeline.data.shards import MANIFEST, read_manifest

_LIBRARIES = ("torch", "torchvision", "lightning", "numpy")


def versions() -> dict[str, str]:
    """Ours, and those of what computes."""
    return {"pipeline": pipeline.__version__, **{name: version(name) for name in _LIBRARIES}}


def fingerprint(place: str) -> str:
    """Of images: the digest of packed ones; of others where they lie, how large that is, and when it changed last.

    "" for what is not there. Raises DataError for shards whose manifest cannot be read.
    """
    path = Path(place)
    if not place or not path.exists():
        return ""
    if (path / MANIFEST).is_file():
        return read_manifest(path).digest
    status = path.stat()
    return hashlib.sha256(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
