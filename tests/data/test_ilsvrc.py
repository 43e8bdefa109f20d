import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from pipeline.data.shards import DataError
from pipeline.data.writer import write_shards
from tests.conftest import noise_image
from tests.data.test_writer import contents, read_with_webdataset


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


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    """Kaggle's tree of the same images as `ilsvrc`, with its csv and its XML annotations."""
    root = tmp_path / "kaggle"
    images, annotations = root / "ILSVRC" / "Data" / "CLS-LOC", root / "ILSVRC" / "Annotations" / "CLS-LOC" / "val"
    for folder in (images / "val", images / "test", annotations):
        folder.mkdir(parents=True)
    for wnid in ("n03", "n01", "n02"):
        (images / "train" / wnid).mkdir(parents=True)
        for number in range(4):
            payload = noise_image(int(wnid[1:]) * 10 + number, 9, 8, "JPEG")
            (images / "train" / wnid / f"{wnid}_{number}.JPEG").write_bytes(payload)
    rows = ["ImageId,PredictionString"]
    for number, wnid in ((2, "n02"), (1, "n01"), (3, "n03")):
        name = f"ILSVRC2012_val_{number:08d}"
        (images / "val" / f"{name}.JPEG").write_bytes(noise_image(100 + number, 9, 8, "JPEG"))
        rows.append(f"{name},{wnid} 1 1 5 5 {wnid} 2 2 6 6 ")
        objects = f"<object><name>{wnid}</name><bndbox><xmin>1</xmin></bndbox></object>" * 2
        (annotations / f"{name}.xml").write_text(f"<annotation>\n<folder>val</folder>{objects}</annotation>")
    (images / "test" / "ILSVRC2012_test_00000001.JPEG").write_bytes(noise_image(9, 9, 8, "JPEG"))
    (root / "LOC_val_solution.csv").write_text("\n".join(rows) + "\n")
    (root / "LOC_synset_mapping.txt").write_text("n03 word n03\nn01 word n01\nn02 word n02\n")
    return root


def test_kaggles_tree_gives_the_same_shards_as_the_published_tars(ilsvrc, kaggle, tmp_path):
    said = []
    write_shards(str(ilsvrc), tmp_path / "tars")
    write_shards(str(kaggle), tmp_path / "tree", workers=2, say=said.append)
    assert contents(tmp_path / "tree") == contents(tmp_path / "tars")
    assert said == [f"{kaggle}/ILSVRC/Data/CLS-LOC: test/ left out, its images have no labels"]


def test_kaggles_ilsvrc_folder_may_be_given_itself_with_its_tables_above_or_within(kaggle, tmp_path):
    expected = write_shards(str(kaggle), tmp_path / "a").digest
    assert write_shards(str(kaggle / "ILSVRC"), tmp_path / "b").digest == expected
    for name in ("LOC_val_solution.csv", "LOC_synset_mapping.txt"):
        (kaggle / name).rename(kaggle / "ILSVRC" / name)
    assert write_shards(str(kaggle / "ILSVRC"), tmp_path / "c").digest == expected


def test_validation_labels_come_from_the_xml_files_where_the_csv_is_absent(kaggle, tmp_path):
    expected = write_shards(str(kaggle), tmp_path / "a").digest
    (kaggle / "LOC_val_solution.csv").unlink()
    assert write_shards(str(kaggle), tmp_path / "b").digest == expected


def test_without_the_mapping_classes_are_called_by_their_wnids(kaggle, tmp_path):
    (kaggle / "LOC_synset_mapping.txt").unlink()
    said = []
    manifest = write_shards(str(kaggle), tmp_path / "out", say=said.append)
    assert [(c.id, c.name) for c in manifest.classes] == [("n01", "n01"), ("n02", "n02"), ("n03", "n03")]
    assert said[0].endswith("no LOC_synset_mapping.txt here or above; classes are called by their WNIDs")


def test_kaggles_training_images_alone_can_hold_out_some_of_themselves(kaggle, tmp_path):
    with pytest.raises(DataError, match="has validation images of its own; leave it out"):
        write_shards(str(kaggle), tmp_path / "out", holdout=0.25)
    shutil.rmtree(kaggle / "ILSVRC" / "Data" / "CLS-LOC" / "val")
    manifest = write_shards(str(kaggle), tmp_path / "out", holdout=0.25)
    assert {split: manifest.count(split) for split in manifest.splits} == {"train": 9, "val": 3}


VAL, XML = "ILSVRC/Data/CLS-LOC/val", "ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml"
ENTITIES = '<!DOCTYPE a [<!ENTITY x "n01">]><annotation><object><name>&x;</name></object></annotation>'


def without_csv(root: Path) -> None:
    (root / "LOC_val_solution.csv").unlink()


def xml(root: Path, text: str) -> None:
    without_csv(root)
    (root / XML).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: (r / VAL / "ILSVRC2012_val_00000002.JPEG").unlink(), "val_00000002 is a label without an image"),
        (lambda r: (r / VAL / "extra.JPEG").write_bytes(b"x"), "extra is an image without a label in val/, the first"),
        (lambda r: (r / VAL / "n01").mkdir(), r"n01 is no file; Kaggle's val/ is flat: .* class folders: .*CLS-LOC"),
        (lambda r: (r / "ILSVRC/Data/CLS-LOC/train/n07").mkdir(), "n07 is a folder, but no class of LOC_synset"),
        (lambda r: shutil.rmtree(r / "ILSVRC/Data/CLS-LOC/train/n02"), "n02 has no folder; unpack Kaggle's archive"),
        (lambda r: shutil.rmtree(r / "ILSVRC/Data/CLS-LOC/train"), "train: No such file or directory; unpack"),
        (lambda r: (r / "LOC_synset_mapping.txt").write_text("n01\n"), "line 1: 'n01' is not one class, WNID WORDS"),
        (lambda r: (r / "LOC_synset_mapping.txt").write_bytes(b"\xff\xfe"), "LOC_synset_mapping.txt: 'utf-8' codec"),
        (lambda r: (r / "LOC_val_solution.csv").write_text("a,b\nx,n01 1 1 1 1 n02 1 1 1 1\n"), "does not give one"),
        (lambda r: (r / "LOC_val_solution.csv").write_text("a,b\nx\n"), "row 'x' does not give one image one class"),
        (lambda r: xml(r, ENTITIES), "00000001.xml: has a document type, which annotations do not need; fetch"),
        (lambda r: xml(r, "<annotation><object>"), "00000001.xml: no element found"),
        (lambda r: xml(r, "<annotation/>"), "00000001.xml: names 0 classes, not one"),
        (lambda r: xml(r, "<annotation><object><name>n99</name></object></annotation>"), "n99, which is not among"),
        (lambda r: (without_csv(r), (r / XML).unlink()), "val_00000001 is an image without a label"),
        (lambda r: (without_csv(r), shutil.rmtree(r / "ILSVRC/Annotations")), "neither LOC_val_solution.csv here or"),
    ],
)  # fmt: skip
def test_a_kaggle_tree_that_does_not_fit_together_is_refused_by_name(kaggle, tmp_path, damage, message):
    damage(kaggle)
    with pytest.raises(DataError, match=message) as refusal:
        write_shards(str(kaggle), tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert not list((tmp_path / "out").glob("*"))


def test_kaggles_zip_is_to_be_unpacked(kaggle, tmp_path):
    with zipfile.ZipFile(tmp_path / "kaggle.zip", "w") as archive:
        for file in sorted(kaggle.rglob("*")):
            archive.write(file, file.relative_to(kaggle))
    with pytest.raises(DataError, match="is Kaggle's zip of ILSVRC2012; unpack it, and give the directory"):
        write_shards(str(tmp_path / "kaggle.zip"), tmp_path / "out")
