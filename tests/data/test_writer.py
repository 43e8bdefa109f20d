import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys, tar_file_iterator

from pipeline.data.shards import DataError, read_index, read_manifest
from pipeline.data.writer import write_shards
from tests.conftest import make_folders, noise_image


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.iterdir())}


def zipped(folder: Path, path: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


def read_with_webdataset(shard: Path) -> list[dict]:
    with shard.open("rb") as file:
        members = ({**member, "__url__": str(shard)} for member in tar_file_iterator(file))
        return list(group_by_keys(members))


def test_one_and_two_workers_write_the_same_bytes(folders, shards, tmp_path):
    write_shards(str(folders), tmp_path / "two", samples_per_shard=30, workers=2)
    assert contents(tmp_path / "two") == contents(shards)


def test_folders_and_their_zip_give_the_same_shards(folders, shards, tmp_path):
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        root = tmp_path / str(compression)
        write_shards(str(zipped(folders, tmp_path / "a.zip", compression)), root, samples_per_shard=30)
        assert contents(root) == contents(shards)


def test_shards_hold_every_image_once_with_its_class(folders, shards):
    manifest = read_manifest(shards)
    assert [c.id for c in manifest.classes] == [f"class{i}" for i in range(5)]
    assert {split: manifest.count(split) for split in manifest.splits} == {"train": 130, "val": 35}
    seen = {}
    for entry in manifest.splits["train"]:
        for sample in read_with_webdataset(shards / entry.shard):  # plain WebDataset reads it
            facts = json.loads(sample["json"])
            image = sample.get("png") or sample["jpg"]
            assert image == (folders / facts["source"]).read_bytes()
            assert int(sample["cls"]) == facts["label"] == int(facts["class"].removeprefix("class"))
            seen[facts["source"]] = sample["__key__"]
    assert len(seen) == 130


def test_shards_are_not_sorted_by_class(shards):
    index = read_index(shards / "train-000000.tar")
    assert len(set(index.label[:10])) > 2


def test_index_points_at_every_payload(shards):
    index = read_index(shards / "train-000001.tar")
    raw = (shards / "train-000001.tar").read_bytes()
    with tarfile.open(shards / "train-000001.tar") as tar:
        for key, offset, length in zip(index.key, index.offset, index.length, strict=True):
            member = next(m for m in tar.getmembers() if m.name.startswith(key + ".") and m.name[-3:] in ("png", "jpg"))
            assert raw[offset : offset + length] == tar.extractfile(member).read()


def test_an_interrupted_write_goes_on_and_ends_with_the_same_bytes(folders, shards, tmp_path):
    root = tmp_path / "shards"
    seen = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done >= 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(str(folders), root, samples_per_shard=30, progress=stop)
    assert not (root / "dataset.json").exists()
    (root / ".train-000003.tar.99.tmp").write_bytes(b"left by a crash")
    (root / "train-000002.json").write_bytes(b"{")  # torn
    again = []
    write_shards(str(folders), root, samples_per_shard=30, progress=lambda done, total: again.append(done))
    assert again[0] == 60  # those were not written again
    assert contents(root) == contents(shards)


def test_writing_the_same_again_changes_nothing(folders, shards):
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    write_shards(str(folders), shards, samples_per_shard=30)
    assert {path: path.stat().st_mtime_ns for path in shards.iterdir()} == before


def test_writing_again_repairs_what_was_lost(folders, shards, tmp_path):
    root = tmp_path / "shards"
    shutil.copytree(shards, root)
    (root / "train-000001.tar").unlink()
    (root / "val-000000.json").write_text("{}")
    write_shards(str(folders), root, samples_per_shard=30)
    assert contents(root) == contents(shards)


def test_of_val_and_test_folders_one_is_used_and_the_other_said_to_be_left_out(folders, tmp_path):
    root = tmp_path / "three"
    shutil.copytree(folders, root)
    shutil.copytree(folders / "val", root / "test")
    said = []
    manifest = write_shards(str(root), tmp_path / "out", say=said.append)
    assert manifest.count("val") == 35
    assert said == [f"{root}: validating on val/; test/ left out"]


def test_a_holdout_that_cannot_be_is_refused(folders, tmp_path):
    for fraction, message in ((-1, "must lie between 0 and 1"), (0.1, "has validation images of its own")):
        with pytest.raises(DataError, match=message):
            write_shards(str(folders), tmp_path / "out", holdout=fraction)


def test_a_damaged_zip_is_named(folders, tmp_path):
    path = zipped(folders, tmp_path / "a.zip")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="neither a directory nor a zip"):
        write_shards(str(path), tmp_path / "out")


def test_another_source_into_the_same_directory_is_refused(shards, tmp_path):
    other = make_folders(tmp_path / "other", classes=2, train=3, val=1)
    with pytest.raises(DataError, match="holds another data set; give an empty directory"):
        write_shards(str(other), shards)


def test_flat_class_folders_hold_out_a_part_of_each_class(folders, tmp_path):
    flat = tmp_path / "flat"
    shutil.copytree(folders / "train", flat)
    with_holdout = write_shards(str(flat), tmp_path / "a", holdout=0.2)
    assert {s: with_holdout.count(s) for s in with_holdout.splits} == {"train": 105, "val": 25}
    assert list(write_shards(str(flat), tmp_path / "b").splits) == ["train"]


def test_digits_come_from_scikit_learn(tmp_path):
    manifest = write_shards("digits", tmp_path / "digits")
    assert {s: manifest.count(s) for s in manifest.splits} == {"train": 1437, "val": 360}
    assert not list((tmp_path / "digits").glob(".*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "train" / "class9").mkdir(), "class folder train/class9 is empty; fill it, or remove it"),
        (
            lambda root: (root / "train" / "class0" / "notes.txt").write_text("hi"),
            "notes.txt is not a JPEG, PNG or WebP",
        ),
        (
            lambda root: (root / "train" / "stray.png").write_bytes(noise_image(0, 4, 4)),
            "stray.png lies in no class folder",
        ),
        (
            lambda root: (root / "train" / "class0" / "000.jpg").write_bytes(noise_image(0, 4, 4)),
            "would both get the key train/class0/000; rename one",
        ),
    ],
)
def test_a_source_that_cannot_be_packed_is_named(tmp_path, damage, message):
    root = make_folders(tmp_path / "source", classes=2, train=3, val=1)
    damage(root)
    with pytest.raises(DataError, match=message):
        write_shards(str(root), tmp_path / "shards")
    assert not (tmp_path / "shards" / "dataset.json").exists()


def test_sources_that_are_none(tmp_path):
    (tmp_path / "text").write_text("x")
    for place, message in (
        ("nowhere", "does not exist"),
        ("text", "neither a directory nor a zip"),
        ("", "no class folder"),
    ):
        with pytest.raises(DataError, match=message):
            write_shards(str(tmp_path / place), tmp_path / "out" / "shards")
    with pytest.raises(DataError, match="is a file; give a directory"):
        write_shards(str(tmp_path), tmp_path / "text")
