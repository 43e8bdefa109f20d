"""Reading tars strictly: what is damaged or cut short is named, never passed over in silence.

Python's tarfile takes a damaged header for the end of the archive, and a tar that ends between two
members for a whole one; a reader built on it loses the rest of a shard without a word. Here a tar ends
with the zero block that POSIX prescribes, or it is refused.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from pipeline.data.shards import DataError

BLOCK = 512
_COMPRESSED = {
    b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\x00": "unxz", b"\x28\xb5\x2f\xfd": "unzstd",
}  # fmt: skip
COMPRESSED_NAMES = {".tgz": "gunzip", ".gz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd"}
# WebDataset's rule: all after the first dot of the last part of the path is the suffix.
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar. header: byte of its header; offset, size: its content."""

    name: str
    header: int
    offset: int
    size: int

    @property
    def key_and_suffix(self) -> tuple[str, str] | None:
        match = _NAME.match(self.name)
        return (match[1], match[2].lower()) if match else None


def members(file: IO[bytes], where: str, remedy: str = "fetch it again") -> Iterator[Member]:
    """Every file of an uncompressed tar. where: its name in messages. Raises DataError for any damage."""
    refuse_compressed(file, where)
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = tar.offset
                tar.members.clear()  # type: ignore[attr-defined]  # which would grow with the archive
                if member.isfile():
                    yield Member(member.name, member.offset, member.offset_data, member.size)
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, OSError) as error:  # numbers in a damaged header, too
        raise DataError(f"{where}: tar header at byte {end}: {error}; {remedy}") from None
    file.seek(end)
    block = file.read(BLOCK)
    if block != bytes(BLOCK):
        what = "damaged tar header" if len(block) == BLOCK else "cut short, its end mark is missing"
        raise DataError(f"{where}: {what} at byte {end}; {remedy}")


def refuse_compressed(file: IO[bytes], where: str) -> None:
    """Raises DataError for a compressed tar: nothing in it can be read by its offset."""
    start = file.read(6)
    file.seek(0)
    for signature, command in _COMPRESSED.items():
        if start.startswith(signature):
            raise DataError(f"{where} is compressed, so that no sample can be read by its offset; {command} it")


def read_dali_index(path: Path) -> set[tuple[str, int, int]]:
    """(suffix, offset, size) of every member that a DALI index (wds2idx, v1.1 or v1.2) lists. Raises DataError."""
    try:
        version, *lines = path.read_text().splitlines()
        named = version.split()[0]
        step = {"v1.1": 3, "v1.2": 4}[named]
        listed = set()
        for line in lines:
            words = line.split()
            if len(words) % step:
                raise ValueError(line)
            listed |= {(words[i].lower(), int(words[i + 1]), int(words[i + 2])) for i in range(0, len(words), step)}
    except (OSError, ValueError, KeyError, IndexError):
        raise DataError(f"{path} is no DALI index of version 1.1 or 1.2; remove it, or make it anew") from None
    return listed


def dali_index(samples: list[list[Member]]) -> str:
    """The text of a DALI index, v1.2: a sample a line, suffix, offset, size and name of each of its members.

    Whitespace parts its columns, so that names which hold some cannot be read back: the text is then empty.
    """
    if any(character.isspace() for sample in samples for member in sample for character in member.name):
        return ""
    lines = [f"v1.2 {len(samples)}"]
    for sample in samples:
        words = []
        for member in sample:
            parts = member.key_and_suffix
            assert parts is not None
            words.append(f"{parts[1]} {member.offset} {member.size} {member.name}")
        lines.append(" ".join(words))
    return "\n".join(lines) + "\n"


def read_energon_index(path: Path) -> list[int]:
    """Header offsets of the samples in Energon's .tar.idx, little-endian uint64. Raises DataError."""
    try:
        return [int(offset) for offset in np.fromfile(path, "<u8")]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}; remove it, or make it anew") from None
