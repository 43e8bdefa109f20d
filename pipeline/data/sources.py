"""Where images come from: class folders, a zip of them, ILSVRC2012, parquet files, or scikit-learn's digits.

Reading is left to whoever packs them.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from pipeline.data.ilsvrc import ILSVRC_TRAIN, ILSVRC_VAL, kaggle_root, kaggle_tree, published_tars
from pipeline.data.keyed_random import permutation
from pipeline.data.parquet import parquet_files, parquet_source
from pipeline.data.shards import ClassName, DataError
from pipeline.data.source import EVALUATED, Sample, Source

SPLITS = {"train": "train"} | dict.fromkeys(EVALUATED, "val")
DIGITS = "digits"


def open_source(location: str, holdout: float = 0.0) -> Source:
    """The images at a location, found out by what lies there.

    location: "digits"; a directory or zip of class folders, with or without train/ and val/ (or test/)
    above them; or a directory with ILSVRC2012, as the three published tars or as Kaggle's tree, or with parquet files.
    holdout: where there is no val/, the fraction of each class set aside for it. Raises DataError.
    """
    path = Path(location)
    if location == DIGITS:
        return Source([ClassName(str(d), str(d)) for d in range(10)], {})  # drawn by `digits`
    if not path.exists():
        raise DataError(
            f"source {path} does not exist; give class folders, a zip of them, ILSVRC2012, or parquet files"
        )
    if not 0 <= holdout < 1:
        raise DataError(f"--holdout {holdout} must lie between 0 and 1; 0.1 holds out a tenth of each class")
    source = _opened(path)
    if not holdout:
        return source
    if "val" in source.splits:
        raise DataError(f"--holdout {holdout}: {path} has validation images of its own; leave it out")
    return replace(source, splits=_held_out(source, holdout))


def _opened(path: Path) -> Source:
    if path.is_dir():
        if (path / ILSVRC_TRAIN).exists() or (path / ILSVRC_VAL).exists():
            return published_tars(path)
        if (kaggle := kaggle_root(path)) is not None:
            return kaggle_tree(kaggle)
        if files := parquet_files(path):
            return parquet_source(files)
        return _class_folders(_folder_files(path), _folders(path), str(path))
    if zipfile.is_zipfile(path):
        return _class_folders(*_zip_files(path), str(path))
    raise DataError(f"source {path} is neither a directory nor a zip; give class folders, or a zip of them")


def read(sample: Sample, archives: dict[str, zipfile.ZipFile]) -> bytes:
    """A sample's bytes; archives keeps zips open between calls."""
    if sample.member:
        archive = archives.get(sample.file) or archives.setdefault(sample.file, zipfile.ZipFile(sample.file))
        return archive.read(sample.member)
    with Path(sample.file).open("rb") as file:
        file.seek(sample.offset)
        return file.read(sample.length)


def digits() -> Iterator[tuple[str, str, int, bytes]]:
    """(split, name, label, PNG) of scikit-learn's 1,797 digits, 8x8; a fixed 360 of them are for validation."""
    # Not at the top: scikit-learn takes 1 s to import, and only this data set needs it.
    from PIL import Image
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    held_out = {int(i) for i in permutation(len(labels), key=0)[:360]}
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        png = io.BytesIO()
        Image.fromarray((image.reshape(8, 8) * (255 / 16)).round().astype("uint8")).save(png, "PNG")
        yield "val" if number in held_out else "train", f"{number:04d}", int(label), png.getvalue()


File = tuple[PurePosixPath, str, int, str]  # path below the root, file, length, member


def _hidden(path: PurePosixPath) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


def _folders(root: Path) -> list[PurePosixPath]:
    found = (PurePosixPath(p.relative_to(root).as_posix()) for p in root.rglob("*") if p.is_dir())
    return [f for f in found if not _hidden(f)]


def _folder_files(root: Path) -> list[File]:
    files = []
    for path in root.rglob("*"):
        below = PurePosixPath(path.relative_to(root).as_posix())
        if path.is_file() and not _hidden(below):
            files.append((below, str(path), path.stat().st_size, ""))
    return files


def _zip_files(path: Path) -> tuple[list[File], list[PurePosixPath]]:
    files, folders = [], []
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DataError(f"{path}: {error}; the zip is damaged, fetch it again") from None
    with archive:
        for info in archive.infolist():
            below = PurePosixPath(info.filename)
            if _hidden(below):
                continue
            if below.parts[:3] == ("ILSVRC", "Data", "CLS-LOC"):
                raise DataError(f"{path} is Kaggle's zip of ILSVRC2012; unpack it, and give the directory")
            if info.is_dir():
                folders.append(below)
            else:
                files.append((below, str(path), info.file_size, info.filename))
    return files, folders


def _class_folders(files: list[File], folders: list[PurePosixPath], where: str) -> Source:
    files, folders, remarks = _one_validation_folder(files, folders, where)
    named = {f[0].parts[0] for f in files if len(f[0].parts) > 1} | {f.parts[0] for f in folders}
    with_splits = "train" in named and named <= set(SPLITS)
    depth = 1 if with_splits else 0
    stray = [f[0] for f in files if len(f[0].parts) < depth + 2]
    if stray:
        raise DataError(f"{where}: {stray[0]} lies in no class folder; expected [train|val/]CLASS/IMAGE")
    class_folders = {f.parts[: depth + 1] for f in folders if len(f.parts) > depth}
    class_folders |= {f[0].parts[: depth + 1] for f in files}
    ids = sorted({f[depth] for f in class_folders})
    if not ids:
        raise DataError(f"{where}: no class folder found; expected [train|val/]CLASS/IMAGE")
    filled = {f[0].parts[: depth + 1] for f in files}
    empty = sorted(class_folders - filled)
    if empty:
        raise DataError(f"{where}: class folder {'/'.join(empty[0])} is empty; fill it, or remove it")
    label_of = {name: label for label, name in enumerate(ids)}
    splits: dict[str, list[Sample]] = {}
    for below, file, length, member in sorted(files, key=lambda f: f[0].parts):
        split = SPLITS.get(below.parts[0], "train") if with_splits else "train"
        sample = Sample(str(below), label_of[below.parts[depth]], file, 0, length, member)
        splits.setdefault(split, []).append(sample)
    return Source([ClassName(name, name) for name in ids], splits, remarks)


def _one_validation_folder(
    files: list[File], folders: list[PurePosixPath], where: str
) -> tuple[list[File], list[PurePosixPath], tuple[str, ...]]:
    """Of val/, validation/ and test/ the first: images of two of them may not be mixed into one score."""
    tops = {f[0].parts[0] for f in files}
    evaluated = [name for name in EVALUATED if name in tops]
    if "train" not in tops or len(evaluated) < 2:
        return files, folders, ()
    spare = evaluated[1:]
    remark = f"{where}: validating on {evaluated[0]}/; {' and '.join(s + '/' for s in spare)} left out"
    return (
        [f for f in files if f[0].parts[0] not in spare],
        [f for f in folders if f.parts[0] not in spare],
        (remark,),
    )


def _held_out(source: Source, fraction: float) -> dict[str, list[Sample]]:
    """A fixed fraction of each class for validation, at least one image."""
    samples = source.splits["train"]
    by_class: dict[int, list[Sample]] = {}
    for sample in samples:
        by_class.setdefault(sample.label, []).append(sample)
    held: set[str] = set()
    for label, members in by_class.items():
        count = max(1, round(fraction * len(members)))
        if count >= len(members):
            raise DataError(
                f"--holdout {fraction} takes {count} of the {len(members)} images of {source.classes[label].id}, "
                "leaving none to train on; lower it, or bring more images"
            )
        held |= {members[i].name for i in permutation(len(members), key=label)[:count]}
    return {
        "train": [s for s in samples if s.name not in held],
        "val": [s for s in samples if s.name in held],
    }
