import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from pipeline.data.shards import DataError
from pipeline.data.writer import write_shards
from tests.conftest import noise_image
from tests.data.test_writer import read_with_webdataset


def add(tar: tarfile.TarFile, name: str, payload: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(payload)
    tar.addfile(member, io.BytesIO(payload))


@pytest.fixture
def ilsvrc(tmp_path: Path) -> Path:
    """The three ILSVRC2012 files with three classes, whose devkit ids run against the order of the WNIDs."""
    root = tmp_path / "ilsvrc"
    root.mkdir()
    wnids = {1: "n03", 2: "n01", 3: "n02"}
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in ("n03", "n01", "n02"):
            inner_path = tmp_path / f"{wnid}.tar"
            with tarfile.open(inner_path, "w") as inner:
                for number in range(4):
                    add(inner, f"{wnid}_{number}.JPEG", noise_image(int(wnid[1:]) * 10 + number, 9, 8, "JPEG"))
            outer.add(inner_path, f"{wnid}.tar")
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in (2, 1, 3):
            add(tar, f"ILSVRC2012_val_{number:08d}.JPEG", noise_image(100 + number, 9, 8, "JPEG"))
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    synsets = np.array([(i, w, f"word {w}", 0) for i, w in wnids.items()] + [(4, "n99", "parent", 3)], dtype=fields)
    savemat(tmp_path / "meta.mat", {"synsets": synsets})
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", (tmp_path / "meta.mat").read_bytes())
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", b"2\n3\n1\n")
    return root


def test_ilsvrc_labels_are_places_among_sorted_wnids_and_not_the_devkits_ids(ilsvrc, tmp_path):
    root = tmp_path / "shards"
    manifest = write_shards(str(ilsvrc), root)
    assert [(c.id, c.name) for c in manifest.classes] == [("n01", "word n01"), ("n02", "word n02"), ("n03", "word n03")]
    train = {}
    for sample in read_with_webdataset(root / "train-000000.tar"):
        train[sample["__key__"]] = (int(sample["cls"]), sample["jpg"])
    assert train["train/n03/n03_2"] == (2, noise_image(32, 9, 8, "JPEG"))
    assert train["train/n01/n01_0"] == (0, noise_image(10, 9, 8, "JPEG"))
    assert len(train) == 12
    val = {s["__key__"]: s for s in read_with_webdataset(root / "val-000000.tar")}
    labels = {key[-1]: int(sample["cls"]) for key, sample in val.items()}
    assert labels == {"1": 0, "2": 1, "3": 2}  # devkit ids 2, 3, 1 are n01, n02, n03
    assert val["val/ILSVRC2012_val_00000002"]["jpg"] == noise_image(102, 9, 8, "JPEG")


def test_ilsvrc_without_its_devkit_is_refused(ilsvrc, tmp_path):
    (ilsvrc / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(DataError, match="the devkit names classes and validation labels, fetch it again"):
        write_shards(str(ilsvrc), tmp_path / "shards")
