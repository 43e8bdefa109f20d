"""ILSVRC2012: the three tars as published, and the tree of Kaggle's "ImageNet Object Localization Challenge".

    DIR/ILSVRC2012_img_train.tar  _img_val.tar  _devkit_t12.tar.gz
    DIR/ILSVRC/Data/CLS-LOC/train/WNID/*.JPEG  val/*.JPEG  test/ (without labels)
    DIR/LOC_synset_mapping.txt  LOC_val_solution.csv  ILSVRC/Annotations/CLS-LOC/val/*.xml

Labels are places in the sorted list of WNIDs, not the devkit's own ids (1..1000). Both give the same samples.
"""

from __future__ import annotations

import csv
import io
import os
import tarfile
import xml.parsers.expat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from pipeline.data.shards import ClassName, DataError
from pipeline.data.source import Sample, Source

ILSVRC_TRAIN, ILSVRC_VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
ILSVRC_DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
KAGGLE_WORDS, KAGGLE_TRUTH = "LOC_synset_mapping.txt", "LOC_val_solution.csv"
TRAIN_IMAGES = 1_281_167  # of the 1,000 classes


def published_tars(root: Path) -> Source:
    """The images at root, in ILSVRC_TRAIN and ILSVRC_VAL, as far as they are there. Raises DataError."""
    classes, wnid_of = _devkit_classes(root)
    label_of = {c.id: label for label, c in enumerate(classes)}
    train_tar, val_tar = root / ILSVRC_TRAIN, root / ILSVRC_VAL
    splits: dict[str, list[Sample]] = {}
    if train_tar.exists():
        train = [
            Sample(f"train/{wnid}/{name}", label_of[wnid], str(train_tar), offset, length)
            for wnid, name, offset, length in _nested_members(train_tar, label_of)
        ]
        splits["train"] = sorted(train, key=lambda s: s.name)
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


def kaggle_root(location: Path) -> Path | None:
    """The ILSVRC folder of Kaggle's tree, where the location is it or holds it."""
    for root in (location / "ILSVRC", location):
        if (root / "Data" / "CLS-LOC").is_dir():
            return root
    return None


def kaggle_tree(root: Path) -> Source:
    """The images of Kaggle's tree. root: its ILSVRC folder. Raises DataError."""
    images, remarks = root / "Data" / "CLS-LOC", []
    folders = {folder.name: Path(folder.path) for folder in _listed(images / "train") if folder.is_dir()}
    words = _kaggle_words(root)
    if words is None:
        remarks.append(f"{root}: no {KAGGLE_WORDS} here or above; classes are called by their WNIDs")
        words = {wnid: wnid for wnid in folders}
    if not folders:
        raise DataError(f"{images / 'train'} holds no class folder; unpack Kaggle's archive again")
    odd = sorted(folders.keys() ^ words.keys())
    if odd:
        what = "has no folder" if odd[0] in words else f"is a folder, but no class of {KAGGLE_WORDS}"
        raise DataError(
            f"{images / 'train'}: {odd[0]} {what}; unpack Kaggle's archive again, or sort the validation images into "
            "folders, too, and give class folders"
        )
    label_of = {wnid: label for label, wnid in enumerate(sorted(words))}
    train = [
        Sample(f"train/{wnid}/{image.name}", label_of[wnid], image.path, 0, image.stat().st_size)
        for wnid in folders
        for image in _images(folders[wnid])
    ]
    splits = {"train": sorted(train, key=lambda s: s.name)}
    if len(words) == 1000 and len(splits["train"]) != TRAIN_IMAGES:
        remarks.append(f"{images / 'train'}: {len(splits['train']):,} images, ILSVRC2012 has {TRAIN_IMAGES:,}")
    if (images / "val").is_dir():
        splits["val"] = _kaggle_val(root, label_of)
    if (images / "test").is_dir():
        remarks.append(f"{images}: test/ left out, its images have no labels")
    return Source([ClassName(wnid, words[wnid]) for wnid in sorted(words)], splits, tuple(remarks))


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, sorted by name, without hidden files. scandir: a million paths in seconds."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; unpack Kaggle's archive again") from None


def _images(folder: Path) -> list[os.DirEntry[str]]:
    images = _listed(folder)
    for image in images:
        if not image.is_file():
            raise DataError(
                f"{image.path} is no file; Kaggle's {folder.name}/ is flat: unpack it again, or, if its images were "
                f"sorted into folders, give class folders: {folder.parent}"
            )
    if not images:
        raise DataError(f"{folder} is empty; unpack Kaggle's archive again")
    return images


def _beside_or_above(root: Path, name: str) -> Path | None:
    return next((path for path in (root.absolute().parent / name, root / name) if path.is_file()), None)


def _kaggle_words(root: Path) -> dict[str, str] | None:
    path = _beside_or_above(root, KAGGLE_WORDS)
    if path is None:
        return None
    words: dict[str, str] = {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        wnid, _, name = line.strip().partition(" ")
        if not line.strip():
            continue
        if not name or wnid in words:
            raise DataError(f"{path}, line {number}: {line!r} is not one class, WNID WORDS; fetch it again")
        words[wnid] = name.strip()
    return words


def _kaggle_val(root: Path, label_of: dict[str, int]) -> list[Sample]:
    """The validation images, each with its label, no image and no label left over."""
    images = {PurePosixPath(image.name).stem: image for image in _images(root / "Data" / "CLS-LOC" / "val")}
    annotations = root / "Annotations" / "CLS-LOC" / "val"
    truth = _beside_or_above(root, KAGGLE_TRUTH)
    if truth is not None:
        wnids = _solution(truth)
    elif annotations.is_dir():
        wnids = {
            PurePosixPath(file.name).stem: _annotated(Path(file.path))
            for file in _listed(annotations)
            if file.name.endswith(".xml")
        }
    else:
        raise DataError(
            f"{root}: neither {KAGGLE_TRUTH} here or above, nor {annotations}; one of them has the validation labels: "
            "fetch it, or remove Data/CLS-LOC/val and use --holdout"
        )
    where = truth or annotations
    odd = sorted(images.keys() ^ wnids.keys())
    if odd:
        what = "an image without a label" if odd[0] in images else "a label without an image"
        raise DataError(f"{where}: {odd[0]} is {what} in val/, the first of {len(odd)}; unpack Kaggle's archive again")
    for name, wnid in wnids.items():
        if wnid not in label_of:
            raise DataError(f"{where}: {name} is of class {wnid}, which is not among the classes; fetch it again")
    return [
        Sample(f"val/{image.name}", label_of[wnids[name]], image.path, 0, image.stat().st_size)
        for name, image in sorted(images.items())
    ]


def _solution(path: Path) -> dict[str, str]:
    """WNID of each image: `ImageId,PredictionString`, where the string is WNID X1 Y1 X2 Y2 for each box."""
    rows = csv.reader(_text(path).splitlines())
    next(rows, None)  # the header
    wnids: dict[str, str] = {}
    for row in rows:
        boxes = row[1].split() if len(row) == 2 else []
        if len(set(boxes[::5])) != 1 or row[0] in wnids:
            raise DataError(f"{path}: row {','.join(row)!r} does not give one image one class; fetch it again")
        wnids[row[0]] = boxes[0]
    return wnids


def _annotated(path: Path) -> str:
    """WNID of one image: annotation/object/name, the same for each of its objects.

    Entities can only be declared in a document type, and none is accepted: nothing expands, no file is fetched.
    """
    found: list[str] = []
    open_tags: list[str] = []
    parser = xml.parsers.expat.ParserCreate()
    parser.buffer_text = True

    def text(data: str) -> None:
        if open_tags == ["annotation", "object", "name"]:
            found.append(data.strip())

    def refuse(*_: object) -> None:
        raise DataError(f"{path}: has a document type, which annotations do not need; fetch the annotations again")

    parser.StartElementHandler = lambda name, _: open_tags.append(name)
    parser.EndElementHandler = lambda _: open_tags.pop()
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(path.read_bytes(), True)
    except (OSError, xml.parsers.expat.ExpatError) as error:
        raise DataError(f"{path}: {error}; fetch the annotations again") from None
    if len(set(found)) != 1:
        raise DataError(f"{path}: names {len(set(found))} classes, not one; fetch the annotations again")
    return found[0]


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}; fetch it again") from None
