"""Hugging Face's parquet files with images inside.

    DIR/[data/]train-00000-of-00294.parquet ...  validation-*.parquet  test-*.parquet
    columns: image, a struct {bytes, path} or plain bytes; label, an integer; class names in the schema's metadata

A sample is a row: FILE/ROW. Its bytes cannot be read in place, since a page of many rows is compressed as one; spool.py
copies them out. pyarrow is an extra: `pip install pyarrow`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shards import ClassName, DataError
from pipeline.data.source import EVALUATED, Sample, Source, Table

IMAGE, LABEL = ("image", "img"), ("label", "labels", "fine_label")  # columns, the usual name first
NO_LABEL = -1  # what Hugging Face writes for the images of a withheld test

_NAME = re.compile(r"(train|val|validation|test)(?:-(\d+)-of-(\d+))?(?:[-.].*)?\.parquet")


@dataclass(frozen=True, slots=True)
class _Contents:
    """What one file says of its images. label_R: of each row, NO_LABEL where there is none."""

    table: Table
    columns: tuple[str, str]
    names: list[str] | None
    label_R: NDArray[np.int64]


def parquet_files(location: Path) -> list[Path]:
    """The parquet files in a directory, or in its data/."""
    for folder in (location, location / "data"):
        files = sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))
        if files:
            return files
    return []


def parquet_source(files: list[Path]) -> Source:
    """The rows of the files of train and of the first labelled split to validate on. Raises DataError."""
    folder, remarks = files[0].parent, []
    named, strays = _by_split(files)
    if strays:
        more = f" and {len(strays) - 1} more files" if strays[1:] else ""
        remarks.append(f"{folder}: {strays[0]}{more} left out, of no split train, validation or test")
    if "train" not in named:
        raise DataError(f"{folder} holds no train-*.parquet among its {len(files)} parquet files; fetch them")
    read = {split: [_contents(path) for path in paths] for split, paths in named.items()}
    labelled = {split: contents for split, contents in read.items() if _has_labels(contents)}
    for split in sorted(read.keys() - labelled.keys()):
        if split == "train":
            raise DataError(f"{folder}: the rows of train have no labels; give files with labels")
        remarks.append(f"{folder}: {split} left out, its images have no labels")
    usable = [split for split in EVALUATED if split in labelled]
    if usable[1:]:
        remarks.append(f"{folder}: validating on {usable[0]}; {' and '.join(usable[1:])} left out")
    used = {"train": labelled["train"]} | ({"val": labelled[usable[0]]} if usable else {})
    every = [contents for split in used.values() for contents in split]
    image, label = every[0].columns
    if (image, label) != (IMAGE[0], LABEL[0]):
        remarks.append(f"{folder}: images are column {image!r}, labels column {label!r}")
    classes = _classes(every, used["train"], remarks)
    splits = {name: [s for contents in split for s in _samples(contents)] for name, split in used.items()}
    return Source(classes, splits, tuple(remarks), tuple(contents.table for contents in every))


def payloads(table: Table) -> Iterator[memoryview]:
    """The bytes of each image of a file, in the order of its rows. Raises DataError.

    Memory is bounded by pages, not by row groups: about three pages are held, and Arrow writes at most 1,024 rows to
    one. Measured on one row group of 4,000 images of 110 KB: 0.35 GB; without buffer_size 0.8 GB, the whole of it.
    """
    file, row = _open(Path(table.path)), 0
    try:
        for batch in file.iter_batches(batch_size=32, columns=[table.column], use_threads=False):
            column = batch.column(0)
            paths: Any = None
            if hasattr(column.type, "get_field_index"):
                children = column.flatten()  # which hands a struct's nulls down to them
                place = column.type.get_field_index("path")
                paths = children[place] if place >= 0 else None
                column = children[column.type.get_field_index("bytes")]
            for number, value in enumerate(column):
                if not value.is_valid:
                    link = paths[number].as_py() if paths is not None else None
                    what = f"only the path {link!r}" if link else "no image"
                    raise DataError(
                        f"{table.path}, row {row}: column {table.column!r} holds {what}; "
                        "write the files again with the images' bytes inside"
                    )
                yield memoryview(value.as_buffer()).cast("B")
                row += 1
    except _faults() as error:
        raise _damaged(Path(table.path), error) from None


def _by_split(files: list[Path]) -> tuple[dict[str, list[Path]], list[str]]:
    """The files of each split, none of them missing, and the names of those of no split."""
    named: dict[str, list[Path]] = {}
    strays: list[str] = []
    numbers: dict[str, list[tuple[int, int]]] = {}
    for path in files:
        found = _NAME.fullmatch(path.name)
        if found is None:
            strays.append(path.name)
            continue
        named.setdefault(found[1], []).append(path)
        if found[2] is not None:
            numbers.setdefault(found[1], []).append((int(found[2]), int(found[3])))
    for split, pairs in numbers.items():
        there, totals = sorted(number for number, _ in pairs), sorted({total for _, total in pairs})
        if len(totals) > 1 or len(set(there)) < len(there) or len(pairs) < len(named[split]):
            raise DataError(
                f"{files[0].parent}: the files of {split} are of more than one numbering; fetch them into an empty "
                "directory"
            )
        missing = sorted(set(range(totals[0])) - set(there))
        if missing:
            raise DataError(
                f"{files[0].parent}: {split}-{missing[0]:05d}-of-{totals[0]:05d}.parquet is missing, the first of "
                f"{len(missing)}; fetch the rest"
            )
    return named, strays


def _contents(path: Path) -> _Contents:
    file = _open(path)
    try:
        schema, metadata = file.schema_arrow, file.metadata
        image = _column(path, schema, IMAGE, _holds_images, "an image: bytes, or a struct of bytes and path")
        label = _column(path, schema, LABEL, _pyarrow().types.is_integer, "a label: an integer")
        label_R = file.read(columns=[label], use_threads=False).column(0).cast("int64").fill_null(NO_LABEL).to_numpy()
        chunks = [metadata.row_group(g).column(c) for g in range(metadata.num_row_groups)
                  for c in range(metadata.num_columns)]  # fmt: skip
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema in (image, f"{image}.bytes"))
        table = Table(str(path), image, metadata.num_rows, size, _fingerprint(path))
        return _Contents(table, (image, label), _class_names(schema, label), label_R)
    except _faults() as error:
        raise _damaged(path, error) from None


def _column(path: Path, schema: Any, names: tuple[str, ...], fits: Callable[[Any], bool], what: str) -> str:
    """The column of the usual name, or else the only one of another known name."""
    fields: list[tuple[str, Any]] = [(field.name, field.type) for field in schema]
    known = [name for name, kind in fields if name in names and fits(kind)]
    if known.count(names[0]) == 1:
        return names[0]
    if len(known) == 1:
        return known[0]
    columns = ", ".join(f"{name} ({kind})" for name, kind in fields)
    raise DataError(f"{path}: no one column {names[0]!r} that holds {what}; of {columns}, rename the one that does")


def _holds_images(kind: Any) -> bool:
    types = _pyarrow().types
    if types.is_struct(kind):
        if kind.get_field_index("bytes") < 0:
            return False
        kind = kind.field("bytes").type
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _class_names(schema: Any, label: str) -> list[str] | None:
    """What the column's feature, as Hugging Face notes it, calls the classes; None if there is no such note."""
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def _has_labels(split: list[_Contents]) -> bool:
    """Whether its rows are labelled; some, but not all, is an error."""
    if all((contents.label_R == NO_LABEL).all() for contents in split):
        return False
    for contents in split:
        without = np.flatnonzero(contents.label_R == NO_LABEL)
        if len(without):
            raise DataError(f"{contents.table.path}, row {without[0]}: has no label, others have; remove such rows")
    return True


def _classes(every: list[_Contents], train: list[_Contents], remarks: list[str]) -> list[ClassName]:
    """The classes on which all files agree; every label is one of them."""
    first = every[0]
    for contents in every:
        if contents.names != first.names or contents.columns != first.columns:
            what = "columns" if contents.columns != first.columns else "class names"
            raise DataError(f"{contents.table.path}: other {what} than {first.table.path}; give files of one data set")
    seen = np.unique(np.concatenate([contents.label_R for contents in train]))
    names = first.names or [str(label) for label in range(int(seen[-1]) + 1)]
    if len(set(names)) < len(names):
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise DataError(f"{first.table.path}: two classes are named {twice!r}; rename one of them")
    for contents in every:
        outside = np.flatnonzero((contents.label_R < 0) | (contents.label_R >= len(names)))
        if len(outside):
            raise DataError(
                f"{contents.table.path}, row {outside[0]}: label {contents.label_R[outside[0]]} lies outside the "
                f"{len(names)} classes; labels run from 0 to {len(names) - 1}"
            )
    absent = sorted(set(range(len(names))) - set(seen.tolist()))
    if absent:
        what = f"no training image of {len(absent)} of {len(names)} classes, the first {names[absent[0]]!r}"
        if first.names is None:  # then nothing but the labels says that there are such classes
            raise DataError(f"{Path(first.table.path).parent}: {what}; number the labels from 0 without gaps")
        remarks.append(f"{Path(first.table.path).parent}: {what}")
    return [ClassName(name, name) for name in names]


def _samples(contents: _Contents) -> Iterator[Sample]:
    path = contents.table.path
    for row, label in enumerate(contents.label_R.tolist()):
        yield Sample(f"{Path(path).stem}/{row:06d}", label, path, member=str(row))


def _fingerprint(path: Path) -> str:
    """Hash of a file's size and footer, which says where each page lies and how long it is: all that can be cheap."""
    with path.open("rb") as file:
        size = file.seek(-8, 2) + 8
        file.seek(-8 - int.from_bytes(file.read(4), "little"), 2)
        return hashlib.sha256(b"%d " % size + file.read()).hexdigest()


def _open(path: Path) -> Any:
    pyarrow = _pyarrow()
    try:
        return pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except _faults() as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: BaseException) -> DataError:
    lines = str(error).splitlines() or [type(error).__name__]
    return DataError(f"{path}: {lines[0]}; the parquet file is damaged, fetch it again")


def _faults() -> tuple[type[BaseException], ...]:
    return OSError, _pyarrow().ArrowException


def _pyarrow() -> Any:
    """The library, which is not among the dependencies: it weighs 170 MB, and this source alone needs it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError("parquet files are read with pyarrow; install it: pip install pyarrow") from None
    return pyarrow
