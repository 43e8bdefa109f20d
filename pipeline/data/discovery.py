"""Which tars make up a data set, and which split each belongs to: by pattern, by `_info.json`, or by their names."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath

from braceexpand import braceexpand

from pipeline.data.shards import DataError
from pipeline.data.tars import COMPRESSED_NAMES

INFO = "_info.json"  # of the Hugging Face data sets timm/*-wds
_SPLIT = re.compile(r"(?:^|[^a-z])(train|training|val|valid|validation|test)(?![a-z])")
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
Names = Callable[[], list[str]]


def find_shards(
    names: Names, where: str, *, train: str = "", val: str = "", info: bytes | None = None
) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Shards of each split in the order of their names, and how many samples each holds, as far as that is stated.

    names: lists the files below the root; not called where patterns without wildcards name every shard.
    train, val: brace patterns or globs below the root; "" = what names say. info: content of _info.json.
    Raises DataError.
    """
    if train or val:
        patterns = {"train": train, "val": val}
        found = {split: _matching(p, names, f"data.{split}", where) for split, p in patterns.items() if p}
        return _whole(found, where), {}
    present = [name for name in names() if not any(part.startswith(".") for part in PurePosixPath(name).parts)]
    if info is not None:
        return _by_info(info, set(present), where)
    tars = sorted(name for name in present if name.endswith(".tar"))
    _refuse_compressed(present, where)
    if not tars:
        raise DataError(
            f"{where} holds no dataset.json and no .tar; make shards with `pipeline shards write SOURCE DIRECTORY`"
        )
    found = {}
    for name in tars:
        match = _SPLIT.search(name.lower())
        if match is None:
            raise DataError(f"{where}/{name}: its name says neither train nor val; say which shards are which, "
                            "data.train='\"PATTERN\"' data.val='\"PATTERN\"'")  # fmt: skip
        found.setdefault(_SPLITS[match[1]], []).append(name)
    if "test" in found:
        tested = found.pop("test")
        found.setdefault("val", tested)
    return _whole(found, where), {}


def _matching(pattern: str, names: Names, field: str, where: str) -> list[str]:
    try:
        expanded = list(braceexpand(pattern))
    except ValueError:
        raise DataError(f"{field} = {pattern!r} has a brace that does not close; write {{0000..1023}}") from None
    _refuse_compressed(expanded, where)
    for name in expanded:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or ":" in name:
            raise DataError(f"{field} = {pattern!r} leads out of data.root = {where}; patterns are relative to it")
    found = []
    present: list[str] | None = None
    for name in expanded:
        if not set(name) & set("*?["):
            found.append(name)
            continue
        present = names() if present is None else present
        matches = fnmatch.filter(present, name)
        if not matches:
            raise DataError(f"{field} = {pattern!r}: nothing in {where} is called {name}")
        found += matches
    return found


def _by_info(info: bytes, present: set[str], where: str) -> tuple[dict[str, list[str]], dict[str, int]]:
    found: dict[str, list[str]] = {}
    stated: dict[str, int] = {}
    try:
        for name, split in json.loads(info)["splits"].items():
            files = list(split["filenames"])
            found[_SPLITS.get(name, name)] = files
            stated.update(zip(files, map(int, split.get("shard_lengths", [])), strict=False))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}/{INFO}: not as its publisher writes it ({error}); remove it") from None
    missing = [name for files in found.values() for name in files if present and name not in present]
    if missing:
        raise DataError(f"{where}: {INFO} names {missing[0]}, which is not there"
                        f"{f', nor are {len(missing) - 1} more' if missing[1:] else ''}; fetch them")  # fmt: skip
    return _whole({s: found[s] for s in ("train", "val") if found.get(s)}, where), stated


def _whole(found: dict[str, list[str]], where: str) -> dict[str, list[str]]:
    for split, names in found.items():
        twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
        if twice:
            raise DataError(f"{where}: {min(twice)} is named twice in split {split}; each sample counts once")
    shared = set(found.get("train", ())) & set(found.get("val", ()))
    if shared:
        raise DataError(f"{where}: {min(shared)} is named for training and for validation; choose one")
    return {split: sorted(names) for split, names in found.items()}


def _refuse_compressed(names: Iterable[str], where: str) -> None:
    for name in sorted(names):
        suffix = PurePosixPath(name).suffix
        if suffix == ".tgz" or (suffix in COMPRESSED_NAMES and PurePosixPath(name).stem.endswith(".tar")):
            raise DataError(f"{where}/{name} is compressed, so that no sample can be read by its offset; unpack all: "
                            f"{COMPRESSED_NAMES[suffix]} {where}/*{suffix}")  # fmt: skip
