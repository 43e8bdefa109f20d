"""Other images and labels to judge a run by: which label each image gets, whatever the layout."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.dataset import Location
from pipeline.data.evaluation_set import EvaluationSet, accepted_answers, class_labels, open_evaluation_set
from pipeline.data.shards import MANIFEST, ClassName, DataError
from pipeline.data.writer import write_shards
from tests.conftest import noise_image
from tests.data.test_ilsvrc import ilsvrc  # noqa: F401  (a fixture)


def named(*names: str) -> list[ClassName]:
    return [ClassName(name, name) for name in names]


@pytest.fixture
def own(tmp_path: Path) -> Location:
    """Where the run's own data lies, and its cache."""
    return Location("elsewhere", cache=str(tmp_path / "cache"))


def folders_of(root: Path, names: list[str], images: int = 2) -> Path:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for image in range(images):
            (root / name / f"{image}.jpg").write_bytes(noise_image(number * 100 + image, 20, 16, "JPEG"))
    return root


def labels_by_key(found: EvaluationSet) -> dict[str, int]:
    split = found.dataset.split(found.split, found.classes)
    return {split.key(i): int(found.label_of[split.label_S[i]]) for i in range(len(split))}


def opened(place: Path | str, known: list[ClassName], own: Location, said: list[str] | None = None) -> EvaluationSet:
    return open_evaluation_set(
        str(place), known, len(known), location=own, say=[].append if said is None else said.append
    )


def test_folders_named_by_number_are_labels_though_their_names_sort_otherwise(tmp_path, own):
    """ImageNet-V2's layout: 0 ... 999, which sort as 0, 1, 10."""
    place = folders_of(tmp_path / "v2", [str(label) for label in range(12)], images=1)
    known = named(*(f"n{label:08d}" for label in range(12)))
    found = opened(place, known, own)
    assert labels_by_key(found) == {f"{label}/0": label for label in range(12)}
    assert found.remark == "all 12 classes, matched by their numbers"


def test_folders_named_like_the_runs_classes_are_those_even_if_they_are_few(tmp_path, own):
    place = folders_of(tmp_path / "set", ["c", "a"])
    found = opened(place, named("a", "b", "c", "d"), own)
    assert labels_by_key(found) == {"a/0": 0, "a/1": 0, "c/0": 2, "c/1": 2}
    assert found.remark == "2 of the 4 classes, matched by their names"


def test_wnids_are_in_sorted_order_where_the_run_knows_numbers_alone():
    ids = named("n03000001", "n01000001", "n02000001")
    assert class_labels(ids, named("0", "1", "2"), 3, "set")[0] == [2, 0, 1]
    with pytest.raises(DataError, match="n03000001 and 1 more of 2 is none of the run's 3"):
        class_labels(ids[:2], named("0", "1", "2"), 3, "set")  # two of three: no order tells which


def test_a_class_that_the_run_does_not_know_is_named_with_the_nearest(tmp_path, own):
    place = folders_of(tmp_path / "set", ["cat", "dogg"])
    with pytest.raises(
        DataError, match=r"class dogg of 2 is none of the run's 3; the nearest is dog; name the folders"
    ):
        opened(place, named("cat", "dog", "horse"), own)
    with pytest.raises(DataError, match="class 3 "):
        class_labels(named("1", "3"), named("a", "b", "c"), 3, "set")


def test_class_folders_are_packed_once_and_anew_when_an_image_changes(tmp_path, own):
    place, said = folders_of(tmp_path / "set", ["a", "b"]), []
    first = opened(place, named("a", "b"), own, said)
    again = opened(place, named("a", "b"), own, said)
    assert again.dataset.directory == first.dataset.directory
    assert len(said) == 1
    assert said[0].startswith(f"packing {place} into {tmp_path}/cache/sets/")
    (place / "a" / "0.jpg").write_bytes(noise_image(7, 21, 16, "JPEG"))
    assert opened(place, named("a", "b"), own).dataset.manifest.digest != first.dataset.manifest.digest


def test_validation_images_are_taken_and_training_images_are_not_packed(folders, tmp_path, own):
    found = opened(folders, named(*(f"class{label}" for label in range(5))), own)
    assert found.split == "val"
    assert {split: found.dataset.manifest.count(split) for split in found.dataset.manifest.splits} == {"val": 35}


def test_a_zip_of_class_folders_is_a_set(tmp_path, own):
    place = folders_of(tmp_path / "set", ["a", "b"])
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in place.rglob("*.jpg"):
            archive.write(path, path.relative_to(place))
    assert labels_by_key(opened(tmp_path / "set.zip", named("b", "a"), own)) == {"a/0": 1, "a/1": 1, "b/0": 0, "b/1": 0}


def test_packed_shards_are_read_where_they_lie(shards, own, tmp_path):
    found = opened(shards, named(*(f"class{label}" for label in reversed(range(5)))), own)
    assert found.dataset.directory == shards
    assert found.label_of.tolist() == [4, 3, 2, 1, 0]
    foreign = tmp_path / "foreign"
    shutil.copytree(shards, foreign)
    (foreign / MANIFEST).unlink()
    assert len(labels_by_key(opened(foreign, named(*(f"class{n}" for n in range(5))), own))) == 35


def test_ilsvrcs_validation_tar_and_devkit_suffice(ilsvrc, own):  # noqa: F811
    (ilsvrc / "ILSVRC2012_img_train.tar").unlink()
    found = opened(ilsvrc, named("n01", "n02", "n03"), own)
    assert labels_by_key(found) == {f"val/ILSVRC2012_val_0000000{n}": n - 1 for n in (1, 2, 3)}


@pytest.mark.parametrize(("place", "message"), [
    ("nowhere", "source .*nowhere does not exist"), ("empty", "no class folder found"),
])  # fmt: skip
def test_a_place_without_images_is_named(tmp_path, own, place, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        opened(tmp_path / place, named("a"), own)


REAL = [[1], [], [0, 2]]


def labels(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "real.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_real_gives_each_image_its_answers_by_its_number_and_not_by_its_place(tmp_path):
    keys = ["val/ILSVRC2012_val_00000003", "n01/ILSVRC2012_val_00000001", "ILSVRC2012_val_00000002"]
    assert accepted_answers(labels(tmp_path, REAL), keys, 3) == [[0, 2], [1], []]


def test_an_object_gives_answers_by_key(tmp_path):
    path = labels(tmp_path, {"a/0": 2, "a/1": [0, 1], "b/0": []})
    assert accepted_answers(path, ["b/0", "a/1", "a/0"], 3) == [[], [0, 1], [2]]


@pytest.mark.parametrize(("content", "key", "message"), [
    (REAL, "00000001", "does not name one"),
    (REAL, "ILSVRC2012_val_00000004", "holds 3 lists, none for"),
    ([[3]], "ILSVRC2012_val_00000001", "has the label 3, outside the run's 3 classes, 0 to 2"),
    ([["cat"]], "ILSVRC2012_val_00000001", "'cat' of ILSVRC2012_val_00000001 is no label"),
    ([[True]], "ILSVRC2012_val_00000001", "True of"),
    ([[]], "ILSVRC2012_val_00000001", "no image of the set has a right answer"),
    ({"b": 1}, "a", "has no label for a; give \\[\\]"),
    ("half of", "a", "is no JSON"),
    ("3", "a", "neither a list nor an object"),
])  # fmt: skip
def test_labels_that_do_not_fit_are_named_with_their_file(tmp_path, content, key, message):
    with pytest.raises(DataError, match=message) as caught:
        accepted_answers(labels(tmp_path, content), [key], 3)
    assert str(caught.value).startswith(f"{tmp_path}/real.json")


def test_a_file_of_labels_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.json: No such file"):
        accepted_answers(tmp_path / "none.json", ["a"], 3)


def test_a_split_can_be_packed_alone(folders, tmp_path):
    manifest = write_shards(str(folders), tmp_path / "val", only=("val",))
    assert list(manifest.splits) == ["val"]
    assert np.load(tmp_path / "val" / "val.samples.npy", allow_pickle=False)["label"].max() == 4


def open_in_a_process(place: Path, own: Location) -> str:
    return opened(place, named("a", "b"), own).dataset.manifest.digest


def test_evaluations_that_come_at_once_pack_a_set_once(tmp_path, own):
    place = folders_of(tmp_path / "set", ["a", "b"], images=400)
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
        digests = set(pool.map(open_in_a_process, [place] * 3, [own] * 3))
    assert len(digests) == 1
