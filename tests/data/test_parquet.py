import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import cli
from pipeline.data import spool
from pipeline.data.parquet import parquet_files, parquet_source, payloads
from pipeline.data.shards import DataError
from pipeline.data.writer import write_shards
from tests.conftest import noise_image
from tests.data.test_writer import contents, read_with_webdataset

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["tench, Tinca tinca", "crane", "ant"]


def picture(number: int) -> bytes:
    return noise_image(number, 9 + number % 3, 8, ("JPEG", "PNG", "WEBP")[number % 3])


def write(path: Path, rows: list[tuple[object, int | None]], *, image="image", label="label", kind=IMAGE, names=NAMES):
    table = pa.table({image: pa.array([i for i, _ in rows], kind), label: pa.array([c for _, c in rows], pa.int64())})
    if names:
        features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=4)


def rows(first: int, count: int, label=lambda number: number % 3) -> list[tuple[object, int | None]]:
    return [({"bytes": picture(n), "path": f"{n}.JPEG"}, label(n)) for n in range(first, first + count)]


@pytest.fixture
def hugging(tmp_path: Path) -> Path:
    """24 training images in files of 11 and 13 rows, 5 to validate on, in three classes."""
    data = tmp_path / "hugging" / "data"
    write(data / "train-00000-of-00002-1b89f4.parquet", rows(0, 11))
    write(data / "train-00001-of-00002-c3ab01.parquet", rows(11, 13))
    write(data / "validation-00000-of-00001.parquet", rows(100, 5))
    return data.parent


def packed(root: Path) -> dict[str, tuple[int, bytes]]:
    return {
        s["__key__"]: (int(s["cls"]), s.get("jpg") or s.get("png") or s["webp"])
        for shard in sorted(root.glob("*.tar"))
        for s in read_with_webdataset(shard)
    }


def test_every_row_becomes_one_sample_with_its_bytes_its_label_and_its_class(hugging, tmp_path):
    said = []
    manifest = write_shards(str(hugging), tmp_path / "out", samples_per_shard=7, say=said.append)
    assert [(c.id, c.name) for c in manifest.classes] == [(name, name) for name in NAMES]
    assert {split: manifest.count(split) for split in manifest.splits} == {"train": 24, "val": 5}
    samples = packed(tmp_path / "out")
    expected = {f"train-00000-of-00002-1b89f4/{row:06d}": (row % 3, picture(row)) for row in range(11)}
    expected |= {f"train-00001-of-00002-c3ab01/{row:06d}": ((row + 11) % 3, picture(row + 11)) for row in range(13)}
    expected |= {f"validation-00000-of-00001/{row:06d}": ((row + 100) % 3, picture(row + 100)) for row in range(5)}
    assert samples == expected
    bytes_in_all = sum(len(payload) for _, payload in expected.values())
    assert len(said) == 1
    needed = int(said[0].split(" bytes;")[0].rsplit(" ", 1)[1].replace(",", ""))
    assert bytes_in_all <= needed <= 2 * bytes_in_all  # the headers of these small pages are counted in
    assert not list((tmp_path / "out").glob(".*"))  # the spool is gone


def test_one_and_two_workers_write_the_same_bytes_and_the_directory_may_be_given_itself(hugging, tmp_path):
    write_shards(str(hugging), tmp_path / "one", samples_per_shard=7)
    write_shards(str(hugging / "data"), tmp_path / "two", samples_per_shard=7, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_plain_bytes_are_as_good_as_a_struct(hugging, tmp_path):
    write_shards(str(hugging), tmp_path / "a")
    for number, kind in enumerate((pa.binary(), pa.large_binary())):
        plain = tmp_path / f"plain{number}"
        for path in parquet_files(hugging):
            table = pq.read_table(path)
            images = [image["bytes"] for image in table["image"].to_pylist()]
            write(plain / path.name, list(zip(images, table["label"].to_pylist(), strict=True)), kind=kind)
        write_shards(str(plain), tmp_path / f"out{number}")
        assert packed(tmp_path / f"out{number}") == packed(tmp_path / "a")


class Stop:
    """Progress that interrupts at the n-th call, noting what it was told."""

    def __init__(self, at: int):
        self.at, self.seen = at, []

    def __call__(self, done: int, total: int) -> None:
        self.seen.append((done, total))
        if len(self.seen) == self.at:
            raise KeyboardInterrupt


def test_an_interrupted_write_goes_on_wherever_it_was_and_ends_with_the_same_bytes(hugging, tmp_path):
    write_shards(str(hugging), tmp_path / "whole", samples_per_shard=7)
    whole = Stop(at=0)
    write_shards(str(hugging), tmp_path / "again", samples_per_shard=7, progress=whole)
    assert whole.seen[:4] == [(0, 29), (11, 29), (24, 29), (29, 29)]  # the spool, a file at a time
    assert whole.seen[4:6] == [(0, 29), (7, 29)]  # and the shards
    for at in range(1, len(whole.seen) + 1):
        root = tmp_path / f"stopped-{at}"
        with pytest.raises(KeyboardInterrupt):
            write_shards(str(hugging), root, samples_per_shard=7, progress=Stop(at))
        assert not (root / "dataset.json").exists()
        rest = Stop(at=0)
        write_shards(str(hugging), root, samples_per_shard=7, progress=rest)
        if at <= 4:
            assert rest.seen[0] == whole.seen[at - 1]  # files that were spooled are not spooled again
        assert contents(root) == contents(tmp_path / "whole")


def test_a_torn_spool_is_made_anew(hugging, tmp_path):
    write_shards(str(hugging), tmp_path / "whole")
    root = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_shards(str(hugging), root, progress=Stop(at=4))
    raw, offsets = (sorted((root / ".spool").glob(f"*.{suffix}")) for suffix in ("raw", "offsets"))
    raw[0].write_bytes(raw[0].read_bytes()[:-1])
    offsets[1].write_bytes(b"\x93NUMPY")
    raw[2].unlink()
    (root / ".spool" / ".left.by.a.crash.tmp").write_bytes(b"x")
    write_shards(str(hugging), root)
    assert contents(root) == contents(tmp_path / "whole")


def test_writing_the_same_again_neither_spools_nor_changes_anything(hugging, tmp_path):
    write_shards(str(hugging), tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / ".spool").mkdir()  # as if killed between the manifest and the end
    write_shards(str(hugging), tmp_path / "out", say=pytest.fail)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_writing_again_repairs_what_was_lost(hugging, tmp_path):
    write_shards(str(hugging), tmp_path / "out", samples_per_shard=7)
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / "val-000000.tar").unlink()
    said = []
    write_shards(str(hugging), tmp_path / "out", samples_per_shard=7, say=said.append)
    assert contents(tmp_path / "out") == whole
    assert "the images of 1 parquet files are copied there first" in said[0]  # of validation alone


def test_other_rows_under_the_same_names_are_another_data_set(hugging, tmp_path):
    write_shards(str(hugging), tmp_path / "out")
    write(hugging / "data" / "validation-00000-of-00001.parquet", rows(200, 5, lambda n: (n - 100) % 3))
    with pytest.raises(DataError, match="holds another data set"):
        write_shards(str(hugging), tmp_path / "out")


def test_too_little_space_is_said_before_anything_is_copied(hugging, tmp_path, monkeypatch):
    monkeypatch.setattr(spool.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10_000, 9_000, 1_000))
    with pytest.raises(
        DataError, match=r"\.spool needs [\d,]+ bytes for the images of 3 parquet files, 1,000 are free"
    ):
        write_shards(str(hugging), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_of_validation_and_test_one_is_used_and_the_other_said_to_be_left_out(hugging, tmp_path):
    data = hugging / "data"
    write(data / "test-00000-of-00001.parquet", rows(300, 4))
    said = []
    assert write_shards(str(hugging), tmp_path / "a", say=said.append).count("val") == 5
    assert said[0] == f"{data}: validating on validation; test left out"
    (data / "validation-00000-of-00001.parquet").unlink()
    assert write_shards(str(hugging), tmp_path / "b").count("val") == 4


@pytest.mark.parametrize("label", [None, -1])
def test_a_split_without_labels_is_left_out(hugging, tmp_path, label):
    data = hugging / "data"
    write(data / "test-00000-of-00001.parquet", rows(300, 4, lambda _: label))
    said = []
    assert write_shards(str(hugging), tmp_path / "a", say=said.append).count("val") == 5
    assert said[0] == f"{data}: test left out, its images have no labels"
    write(data / "validation-00000-of-00001.parquet", rows(100, 5, lambda _: label))
    assert list(write_shards(str(hugging), tmp_path / "b").splits) == ["train"]
    assert write_shards(str(hugging), tmp_path / "c", holdout=0.2).count("val") == 6


def test_columns_of_other_known_names_are_taken_if_there_is_one_of_each(tmp_path):
    write(tmp_path / "s" / "train.parquet", rows(0, 6), image="img", label="fine_label")
    said = []
    write_shards(str(tmp_path / "s"), tmp_path / "out", say=said.append)
    assert said[0] == f"{tmp_path / 's'}: images are column 'img', labels column 'fine_label'"
    assert packed(tmp_path / "out")["train/000004"] == (1, picture(4))


def test_without_names_in_the_metadata_classes_are_called_by_their_numbers(tmp_path):
    write(tmp_path / "s" / "train.parquet", rows(0, 6), names=None)
    manifest = write_shards(str(tmp_path / "s"), tmp_path / "out")
    assert [c.id for c in manifest.classes] == ["0", "1", "2"]


def test_images_can_be_re_encoded_on_the_way(tmp_path):
    write(
        tmp_path / "s" / "train.parquet", [({"bytes": noise_image(n, 40, 30), "path": None}, n % 3) for n in range(4)]
    )
    write_shards(str(tmp_path / "s"), tmp_path / "out", shorter_side=16)
    sample = read_with_webdataset(tmp_path / "out" / "train-000000.tar")[0]
    assert json.loads(sample["json"])["original"] == [40, 30]
    assert sample["jpg"]


TRAIN = "data/train-00000-of-00002-1b89f4.parquet"


def one(image: object, label: int | None = 0):
    return [*rows(0, 5), (image, label)]


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + 40] = b"\xff" * 40
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: (r / TRAIN).unlink(), "train-00000-of-00002.parquet is missing, the first of 1; fetch the rest"),
        (lambda r: write(r / "data/train-00000-of-00003.parquet", rows(0, 3)), "of more than one numbering"),
        (lambda r: write(r / "data/train-00001-of-00002-d.parquet", rows(0, 3)), "of more than one numbering"),
        (lambda r: write(r / "data/train.parquet", rows(0, 3)), "of more than one numbering"),
        (lambda r: [p.unlink() for p in r.glob("data/train*")], "holds no train-.*parquet among its 1 parquet files"),
        (lambda r: cut(r / TRAIN, 900), "1b89f4.parquet: .*; the parquet file is damaged, fetch it again"),
        (lambda r: cut(r / TRAIN, 0), "1b89f4.parquet: .*; the parquet file is damaged, fetch it again"),
        (lambda r: flip(r / TRAIN, 4), "1b89f4.parquet: .*; the parquet file is damaged, fetch it again"),
        (lambda r: write(r / TRAIN, one({"bytes": None, "path": "images/7.jpg"})),
         "1b89f4.parquet, row 5: column 'image' holds only the path 'images/7.jpg'; write the files again"),
        (lambda r: write(r / TRAIN, one(None)), "1b89f4.parquet, row 5: column 'image' holds no image; write"),
        (lambda r: write(r / TRAIN, one({"bytes": b"text", "path": "x"})), "row 5: column 'image' is not a JPEG, PNG"),
        (lambda r: write(r / TRAIN, one({"bytes": b"", "path": "x"})), "row 5: column 'image' is not a JPEG, PNG"),
        (lambda r: write(r / TRAIN, one({"bytes": picture(0), "path": ""}, None)), "row 5: has no label, others have"),
        (lambda r: write(r / TRAIN, one({"bytes": picture(0), "path": ""}, 3)),
         "row 5: label 3 lies outside the 3 classes; labels run from 0 to 2"),
        (lambda r: write(r / TRAIN, rows(0, 5), names=["a", "b", "c"]), "other class names than .*1b89f4"),
        (lambda r: write(r / TRAIN, rows(0, 5), label="labels"), "other columns than .*1b89f4"),
        (lambda r: write(r / TRAIN, rows(0, 5), label="kind"),
         r"column 'label' that holds a label: an integer; of image \(struct<bytes: binary, path: string>\), kind"),
        (lambda r: write(r / TRAIN, [("7.jpg", 1)], kind=pa.string()), r"column 'image' .*; of image \(string\)"),
        (lambda r: [write(p, rows(0, 5), names=["a", "b", "a"]) for p in parquet_files(r)], "two classes are named"),
        (lambda r: [write(p, rows(0, 5, lambda n: n * 2), names=None) for p in parquet_files(r)],
         "no training image of 4 of 9 classes, the first '1'; number the labels from 0"),
        (lambda r: [write(p, rows(0, 5, lambda _: None)) for p in parquet_files(r)], "rows of train have no labels"),
    ],
)  # fmt: skip
def test_parquet_files_that_cannot_be_packed_are_named(hugging, tmp_path, damage, message):
    damage(hugging)
    with pytest.raises(DataError, match=message) as refusal:
        write_shards(str(hugging), tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert not list((tmp_path / "out").glob("[!.]*"))  # but for what was spooled


def test_two_label_columns_that_could_be_meant_are_not_guessed(tmp_path):
    image = pa.array([{"bytes": picture(0), "path": None}], IMAGE)
    (tmp_path / "s").mkdir()
    pq.write_table(pa.table({"img": image, "labels": [0], "fine_label": [0]}), tmp_path / "s" / "train.parquet")
    with pytest.raises(
        DataError, match=r"no one column 'label' .*; of img \(.*\), labels \(int64\), fine_label \(int64\)"
    ):
        write_shards(str(tmp_path / "s"), tmp_path / "out")


def test_classes_without_images_and_files_of_no_split_are_remarked(tmp_path):
    write(tmp_path / "s" / "train.parquet", rows(0, 6, lambda n: n % 2))
    write(tmp_path / "s" / "extra.parquet", rows(0, 6))
    source = parquet_source(parquet_files(tmp_path / "s"))
    assert source.remarks == (
        f"{tmp_path / 's'}: extra.parquet left out, of no split train, validation or test",
        f"{tmp_path / 's'}: no training image of 1 of 3 classes, the first 'ant'",
    )


def test_images_are_read_in_pieces_of_a_row_group(tmp_path):
    images = [bytes([n % 251]) * 20_000 for n in range(3000)]
    (tmp_path / "s").mkdir()
    path = tmp_path / "s" / "train.parquet"
    pq.write_table(pa.table({"image": images, "label": [0] * 3000}), path, use_dictionary=False, compression="none")
    assert pq.ParquetFile(path).metadata.num_row_groups == 1  # 60 MB
    pa.default_memory_pool().release_unused()
    before, most = pa.total_allocated_bytes(), 0
    for number, payload in enumerate(payloads(parquet_source([path]).tables[0])):
        most = max(most, pa.total_allocated_bytes() - before)
        assert payload == images[number]
    assert 0 < most < 45e6


def test_without_pyarrow_one_line_says_what_to_install(hugging, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert cli.main(["shards", "write", str(hugging), str(tmp_path / "out")]) == 3
    assert capsys.readouterr().err == (
        "pipeline: parquet files are read with pyarrow; install it: pip install pyarrow\n"
    )
