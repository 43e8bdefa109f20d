"""ILSVRC2012 as published: three tars.

Labels are places in the sorted list of WNIDs, not the devkit's own ids (1..1000).
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from pipeline.data.shards import ClassName, DataError
from pipeline.data.source import Sample, Source

ILSVRC_TRAIN, ILSVRC_VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
ILSVRC_DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


def published_tars(root: Path) -> Source:
    """The images at root, in ILSVRC_TRAIN and, where it is there, ILSVRC_VAL. Raises DataError."""
    classes, wnid_of = _devkit_classes(root)
    label_of = {c.id: label for label, c in enumerate(classes)}
    train_tar, val_tar = root / ILSVRC_TRAIN, root / ILSVRC_VAL
    train = [
        Sample(f"train/{wnid}/{name}", label_of[wnid], str(train_tar), offset, length)
        for wnid, name, offset, length in _nested_members(train_tar, label_of)
    ]
    splits = {"train": sorted(train, key=lambda s: s.name)}
    if val_tar.exists():
        truth = _devkit_member(root, "ILSVRC2012_validation_ground_truth.txt").decode().split()
        with val_tar.open("rb") as file:
            members = sorted(_members(file, val_tar), key=lambda m: m[0])
        if len(members) != len(truth):
            raise DataError(f"{val_tar}: {len(members)} images, but the devkit has {len(truth)} labels; fetch it again")
        splits["val"] = [
            Sample(f"val/{name}", label_of[wnid_of[int(number)]], str(val_tar), offset, length)
            for (name, offset, length), number in zip(members, truth, strict=True)
        ]
    return Source(classes, splits)


def _devkit_member(root: Path, name: str) -> bytes:
    path = root / ILSVRC_DEVKIT
    try:
        with tarfile.open(path, "r:gz") as devkit:
            for member in devkit:
                if PurePosixPath(member.name).name == name:
                    file = devkit.extractfile(member)
                    if file is not None:
                        return file.read()
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path}: {error}; the devkit names classes and validation labels, fetch it again") from None
    raise DataError(f"{path}: holds no {name}; fetch the devkit of task 1 and 2 again")


def _devkit_classes(root: Path) -> tuple[list[ClassName], dict[int, str]]:
    from scipy.io import loadmat

    synsets = loadmat(io.BytesIO(_devkit_member(root, "meta.mat")), squeeze_me=True)["synsets"]
    leaves = [s for s in synsets if int(s["num_children"]) == 0]
    wnid_of = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in leaves}
    words = {str(s["WNID"]): str(s["words"]) for s in leaves}
    return [ClassName(wnid, words[wnid]) for wnid in sorted(words)], wnid_of


class _Slice(io.RawIOBase):
    """A range of a file as a file, so that a tar inside a tar is listed without being copied out."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int):
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._file.seek(self._offset + self._at)
        piece = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def _members(file: io.BufferedIOBase | io.BufferedReader, where: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, length) of every file of an uncompressed tar."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    yield member.name, member.offset_data, member.size
    except tarfile.TarError as error:
        raise DataError(f"{where}: {error}; fetch it again") from None


def _nested_members(path: Path, wnids: Iterable[str]) -> Iterator[tuple[str, str, int, int]]:
    known = set(wnids)
    with path.open("rb") as file:
        for class_tar, start, length in list(_members(file, path)):
            wnid = PurePosixPath(class_tar).stem
            if wnid not in known:
                raise DataError(f"{path}: {class_tar} is of no class that the devkit names; fetch both again")
            inner = io.BufferedReader(_Slice(file, start, length))
            for name, offset, size in _members(inner, path / class_tar):
                yield wnid, name, start + offset, size
