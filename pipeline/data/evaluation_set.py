"""Other images than a run's own to judge it by, and other labels: found out by what lies there.

images   a packed data set, tars or a URL of them; class folders or a zip of them; ILSVRC2012; packed on first use
         into data.cache, so that they are read like all others
classes  by their identities, where the run knows them; by number where folders are called 0, 1, 2, ... as those of
         ImageNet-V2 (Recht et al. 2019), whose names sort as 0, 1, 10; by the sorted order of WNIDs
labels   ReaL (Beyer et al. 2020): a JSON list with a list of right answers for each of ILSVRC2012's validation
         images, in the order of their numbers; or a JSON object, KEY -> label or labels
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.dataset import Dataset, Location, alone, open_dataset
from pipeline.data.discovery import INFO
from pipeline.data.ilsvrc import ILSVRC_TRAIN, ILSVRC_VAL
from pipeline.data.indexing import Progress
from pipeline.data.remote import is_remote
from pipeline.data.shards import MANIFEST, ClassName, DataError
from pipeline.data.sources import open_source

_NUMBERED = re.compile(r"(?:^|/)ILSVRC2012_val_(\d{8})")
_WNID = re.compile(r"n\d{8}")
_UNFIT = re.compile(r"[^\w.-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """Images to be judged by. split: of the data set. label_of: the run's label for each class of the set.

    name: for directories and titles. is_own: whether they are the run's own validation images.
    """

    dataset: Dataset
    split: str
    label_of: NDArray[np.int64]
    name: str = "val"
    remark: str = ""  # how the classes were matched, for whoever looks
    is_own: bool = False

    @property
    def classes(self) -> int:
        """How many classes its labels are of."""
        return len(self.label_of)

    @property
    def digest(self) -> str:
        """Of the images, and of what their classes are to the run."""
        labels = hashlib.sha256(self.label_of.astype("<i8").tobytes()).hexdigest()
        return f"{self.dataset.manifest.digest}-{labels[:16]}"

    @property
    def images(self) -> int:
        return self.dataset.manifest.count(self.split)


def own_images(dataset: Dataset, num_classes: int) -> EvaluationSet:
    """A run's validation images."""
    return EvaluationSet(dataset, "val", np.arange(num_classes), is_own=True)


def open_evaluation_set(
    place: str,
    known: Sequence[ClassName],
    num_classes: int,
    *,
    location: Location,
    workers: int = 1,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = print,
) -> EvaluationSet:
    """The images at a place, for a run with `known` classes. location: of the run's own data, whose cache is used.

    Raises DataError for a place that holds no images, or classes that the run does not know.
    """
    own = replace(location, root=place, train="", val="", stage=False)
    if _holds_shards(place):
        dataset = open_dataset(own, workers=workers, patient=False, progress=progress, say=say)
    else:
        dataset = _packed(place, own, workers, progress, say)
    split = "val" if "val" in dataset.manifest.splits else next(iter(sorted(dataset.manifest.splits)))
    labels, remark = class_labels(dataset.manifest.classes, known, num_classes, place)
    name = _UNFIT.sub("_", Path(place.rstrip("/")).name) or "set"
    return EvaluationSet(dataset, split, np.array(labels, dtype=np.int64), name, remark)


def class_labels(
    classes: Sequence[ClassName], known: Sequence[ClassName], num_classes: int, place: str
) -> tuple[list[int], str]:
    """The run's label of each class of a set, and how it was found. Raises DataError."""
    ids, run_ids = [c.id for c in classes], [c.id for c in known]
    label_of = {identity: label for label, identity in enumerate(run_ids)}
    if all(identity in label_of for identity in ids):
        return [label_of[identity] for identity in ids], _counted(len(ids), num_classes, "by their names")
    numbers = all(identity.isdecimal() for identity in ids)
    if numbers and all(int(identity) < num_classes for identity in ids):
        return [int(identity) for identity in ids], _counted(len(ids), num_classes, "by their numbers")
    numbered = all(identity == str(label) for label, identity in enumerate(run_ids))
    if numbered and len(ids) == num_classes and all(_WNID.fullmatch(identity) for identity in ids):
        return [sorted(ids).index(i) for i in ids], _counted(len(ids), num_classes, "by the sorted order of WNIDs")
    unknown = [i for i in ids if (int(i) >= num_classes if numbers else i not in label_of)]
    near = difflib.get_close_matches(unknown[0], run_ids, n=1)
    raise DataError(
        f"{place}: class {unknown[0]}{f' and {len(unknown) - 1} more' if unknown[1:] else ''} of {len(ids)} is none of "
        f"the run's {num_classes}{f'; the nearest is {near[0]}' if near else ''}; name the folders like the run's "
        f"classes (as {', '.join(run_ids[:3])}), or by their labels, 0 to {num_classes - 1}"
    )


def accepted_answers(path: Path, keys: Sequence[str], num_classes: int) -> list[list[int]]:
    """The right answers for each image by its key, from a file of labels. Raises DataError."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give a JSON file of labels, as ReaL's real.json") from None
    except ValueError as error:
        raise DataError(
            f"{path} is no JSON ({error}); give a list of labels, as ReaL's real.json, or an object"
        ) from None
    with _shown(path):
        found = [_answers(content, key) for key in keys]
    for key, answers in zip(keys, found, strict=True):
        for answer in answers:
            if not 0 <= answer < num_classes:
                raise DataError(f"{path}: {key} has the label {answer}, outside the run's {num_classes} classes, 0 to "
                                f"{num_classes - 1}; give labels of the same classes")  # fmt: skip
    if not any(found):
        raise DataError(f"{path}: no image of the set has a right answer there; give the labels of this set")
    return found


def _answers(content: Any, key: str) -> list[int]:
    if isinstance(content, list):
        match = _NUMBERED.search(key)
        if match is None:
            raise DataError(f"a list is in the order of ILSVRC2012's validation images, and the key {key} does not "
                            "name one (ILSVRC2012_val_NNNNNNNN); give an object, KEY -> labels")  # fmt: skip
        number = int(match[1])
        if not 1 <= number <= len(content):
            raise DataError(f"holds {len(content):,} lists, none for {key}; give the labels of this set")
        return _whole(content[number - 1], key)
    if not isinstance(content, dict):
        raise DataError("holds neither a list nor an object; give a list of labels, as ReaL's real.json, or an object")
    if key not in content:
        raise DataError(f"has no label for {key}; give [] for an image that does not count")
    return _whole(content[key], key)


def _whole(value: Any, key: str) -> list[int]:
    values = value if isinstance(value, list) else [value]
    for each in values:
        if not isinstance(each, int) or isinstance(each, bool):
            raise DataError(f"{each!r} of {key} is no label; labels are whole numbers from 0")
    return values


@contextmanager
def _shown(path: Path) -> Iterator[None]:
    """Faults found within a file begin with its name."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _counted(classes: int, num_classes: int, how: str) -> str:
    of = f"all {num_classes:,}" if classes == num_classes else f"{classes:,} of the {num_classes:,}"
    return f"{of} classes, matched {how}"


def _holds_shards(place: str) -> bool:
    if is_remote(place):
        return True
    path = Path(place)
    if not path.is_dir():
        return False
    published = {ILSVRC_TRAIN, ILSVRC_VAL}
    return (path / MANIFEST).is_file() or (path / INFO).is_file() or any(
        tar.name not in published for tar in path.glob("*.tar")
    )  # fmt: skip


def _packed(place: str, own: Location, workers: int, progress: Progress, say: Callable[[str], None]) -> Dataset:
    """The images of a place that holds no shards, packed once; of another content they are another set."""
    from pipeline.data.writer import write_shards  # 1.5 s to import, needed once a set

    source = open_source(place)
    splits = {name: samples for name, samples in source.splits.items() if name == "val" or "val" not in source.splits}
    files = sorted({sample.file for samples in splits.values() for sample in samples} | {t.path for t in source.tables})
    written = [(file, (status := Path(file).stat()).st_size, status.st_mtime_ns) for file in files]
    name = hashlib.sha256(json.dumps([str(Path(place).resolve()), written]).encode()).hexdigest()[:16]
    root = own.cache_directory / "sets" / name
    with alone(root):  # an array of evaluations, or the ranks of one, may come at once
        if not (root / MANIFEST).is_file():
            say(f"packing {place} into {root}, once")
            write_shards(place, root, only=tuple(splits), workers=workers, progress=progress, say=say)
    return open_dataset(replace(own, root=str(root)), say=say)
