"""Images copied out of parquet files, so that each can be read by itself in any order.

    ROOT/.spool/FILE.FINGERPRINT.raw        the images of one parquet file, one after another
    ROOT/.spool/FILE.FINGERPRINT.offsets    int64 (rows + 1): where each begins, and where the last one ends

A file with its offsets is done; both come in by a rename. The spool goes when the shards are written.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.decode import image_type
from pipeline.data.parquet import payloads
from pipeline.data.pool import completed
from pipeline.data.shards import DataError, write_atomically
from pipeline.data.source import Sample, Table

SPOOL = ".spool"


def spool(
    tables: Sequence[Table],
    root: Path,
    workers: int,
    progress: Callable[[int, int], None],
    say: Callable[[str], None],
) -> Callable[[Sample], Sample]:
    """Copy the tables' images below root; goes on where an earlier call stopped. Returns what finds a sample there.

    Raises DataError for a table that cannot be read, or too little space.
    """
    folder = root / SPOOL
    expected = {path.name for table in tables for path in _paths(folder, table)}
    for stray in folder.glob("*") if folder.exists() else ():
        if stray.name not in expected:  # torn by a crash, or of another version of a file
            stray.unlink()
    waiting = [table for table in tables if _offsets(folder, table) is None]
    needed, free = sum(table.bytes for table in waiting), shutil.disk_usage(root).free
    if needed > free:
        raise DataError(
            f"{folder} needs {needed:,} bytes for the images of {len(waiting)} parquet files, {free:,} are free; "
            "make room, or write to another disk"
        )
    if waiting:
        say(
            f"{folder}: the images of {len(waiting)} parquet files are copied there first, {needed:,} bytes; "
            "removed when the shards are written"
        )
        folder.mkdir(exist_ok=True)
    total = sum(table.rows for table in tables)
    done = total - sum(table.rows for table in waiting)
    progress(done, total)
    with closing(completed(_spool_table, [(folder, table) for table in waiting], workers)) as counts:
        for count in counts:
            done += count
            progress(done, total)
    places = {table.path: (str(_paths(folder, table)[0]), _read_offsets(folder, table)) for table in tables}

    def spooled(sample: Sample) -> Sample:
        file, offsets = places[sample.file]
        begin, end = offsets[int(sample.member) :][:2].tolist()
        return replace(sample, file=file, offset=begin, length=end - begin, member="")

    return spooled


def remove_spool(root: Path) -> None:
    shutil.rmtree(root / SPOOL, ignore_errors=True)


def _paths(folder: Path, table: Table) -> tuple[Path, Path]:
    stem = f"{Path(table.path).name}.{table.fingerprint[:16]}"
    return folder / f"{stem}.raw", folder / f"{stem}.offsets"


def _spool_table(task: tuple[Path, Table]) -> int:
    """Copy one parquet file's images; returns their number."""
    folder, table = task
    raw, places = _paths(folder, table)
    temporary = raw.with_name(f".{raw.name}.{os.getpid()}.tmp")
    offsets = [0]
    try:
        with temporary.open("wb") as file:
            for payload in payloads(table):
                if image_type(bytes(payload[:16])) is None:
                    raise DataError(
                        f"{table.path}, row {len(offsets) - 1}: column {table.column!r} is not a JPEG, PNG or WebP "
                        "image; remove the row"
                    )
                file.write(payload)
                offsets.append(offsets[-1] + len(payload))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(raw)
        content = io.BytesIO()
        np.save(content, np.array(offsets, dtype=np.int64))
        write_atomically(places, content.getvalue())
    except OSError as error:
        raise DataError(f"{raw}: {error}; what is written stays, the same command goes on from there") from None
    finally:
        temporary.unlink(missing_ok=True)
    return len(offsets) - 1


def _read_offsets(folder: Path, table: Table) -> NDArray[np.int64]:
    offsets = _offsets(folder, table)
    if offsets is None:
        raise DataError(f"{_paths(folder, table)[0]}: changed while it was read; the same command goes on from there")
    return offsets


def _offsets(folder: Path, table: Table) -> NDArray[np.int64] | None:
    """Where the images of a table lie; None if it is still to be spooled."""
    raw, places = _paths(folder, table)
    try:
        offsets: NDArray[np.int64] = np.load(places, allow_pickle=False)
        size = raw.stat().st_size
    except (OSError, ValueError, EOFError):
        return None
    whole = offsets.dtype == np.int64 and offsets.shape == (table.rows + 1,) and offsets[-1] == size
    return offsets if whole else None
