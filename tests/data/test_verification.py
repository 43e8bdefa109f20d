import json
import shutil
from pathlib import Path

import pytest

from pipeline.data.dataset import Dataset, Location, open_dataset
from pipeline.data.shards import DataError, read_index, read_manifest
from pipeline.data.verification import verify


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def opened(root: Path) -> Dataset:
    return open_dataset(Location(str(root)))


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def test_sound_shards_have_no_fault(shards):
    report = verify(opened(shards), decode_images=True, workers=2)
    assert (report.samples, report.faults) == (165, [])


def test_a_flipped_byte_in_a_payload_names_the_image(copy):
    shard = copy / "train-000001.tar"
    index = read_index(shard)
    flip(shard, index.offset[7] + index.length[7] // 2)
    (fault,) = verify(opened(copy)).faults
    assert f"{shard}: image {index.key[7]} " in fault
    assert "differs from what was indexed" in fault


def test_a_flipped_byte_in_a_header_names_the_header(copy):
    shard = copy / "train-000001.tar"
    index = read_index(shard)
    flip(shard, index.offset[7] - 512 + 20)  # in the name, in the header of the image
    (fault,) = verify(opened(copy)).faults
    assert f"{shard}: damaged tar header at byte" in fault


def test_a_flipped_byte_in_the_table_names_the_table(copy):
    path = copy / "val.samples.npy"
    flip(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match=rf"{path}: damaged, or of another data set than dataset\.json"):
        verify(opened(copy))


@pytest.mark.parametrize("place", range(0, 512 * 40, 331))
def test_no_flipped_byte_of_a_shard_goes_unseen(copy, place):
    flip(copy / "train-000000.tar", place)
    assert verify(opened(copy)).faults


def test_a_changed_label_a_short_and_a_missing_shard_are_named(copy):
    shard = copy / "train-000002.tar"
    shard.write_bytes(shard.read_bytes()[:-700])
    (copy / "train-000003.tar").unlink()
    faults = "\n".join(verify(opened(copy)).faults)
    assert f"{shard}: has" in faults
    assert f"{copy / 'train-000003.tar'}: missing" in faults


def test_training_refuses_shards_that_changed(copy):
    shard = copy / "train-000000.tar"
    shard.write_bytes(shard.read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"bytes, dataset\.json says .*; run `pipeline shards verify"):
        opened(copy).check_shards()
    shard.unlink()
    with pytest.raises(DataError, match=r"lacks train-000000\.tar; bring the shards back"):
        opened(copy).check_shards()


def test_a_label_outside_the_classes_is_named(shards):
    with pytest.raises(DataError, match=r"label [34] of sample .* lies outside the 3 classes; labels run from 0 to 2"):
        opened(shards).split("train", 3)


def test_a_root_that_is_no_data_set_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    for root, message in (
        (file, "is a file; give the directory"),
        (tmp_path / "nowhere", "does not exist; make it with `pipeline shards write"),
        (tmp_path, "holds no dataset.json"),
    ):
        with pytest.raises(DataError, match=message):
            read_manifest(root)
    (tmp_path / "dataset.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(DataError, match="damaged"):
        read_manifest(tmp_path)
