"""Shards of other makers, as they are published: found, indexed once, and refused by name where they cannot be used."""

import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import tarfile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.dataset import Dataset, Location, open_dataset
from pipeline.data.shards import DataError
from pipeline.data.stream import ShardStream
from tests.conftest import noise_image

quiet = {"say": lambda text: None}


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def timm_sample(number: int, label: int) -> list[tuple[str, bytes]]:
    """As timm/imagenet-1k-wds has them."""
    facts = {"label": label, "filename": f"n{label:08d}_{number}.JPEG", "width": 20, "height": 18}
    return [
        (f"n{label:08d}_{number}.cls", str(label).encode()),
        (f"n{label:08d}_{number}.jpg", noise_image(number, 20, 18, "JPEG")),
        (f"n{label:08d}_{number}.json", json.dumps(facts).encode()),
    ]


def timm_tree(root: Path, info: bool = True) -> Path:
    names = {
        "train": [f"imagenet1k-train-{i:04d}.tar" for i in range(3)],
        "validation": ["imagenet1k-validation-00.tar"],
    }
    number = 0
    for files in names.values():
        for name in files:
            members = []
            for _ in range(7):
                members += timm_sample(number, number % 5)
                number += 1
            write_tar(root / name, members)
    if info:
        splits = {
            s: {"filenames": f, "shard_lengths": [7] * len(f), "num_samples": 7 * len(f)} for s, f in names.items()
        }
        (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


def opened(root: Path, **where: str) -> Dataset:
    return open_dataset(Location(str(root), **where), **quiet)


def labels_by_key(dataset: Dataset, name: str) -> dict[str, int]:
    split = dataset.split(name)
    return {split.key(sample): int(split.label_S[sample]) for sample in range(len(split))}


@pytest.mark.parametrize("info", [True, False])
def test_timms_layout_drops_in_with_and_without_its_info(tmp_path, info):
    dataset = opened(timm_tree(tmp_path, info))
    assert {s: dataset.manifest.count(s) for s in dataset.manifest.splits} == {"train": 21, "val": 7}
    assert labels_by_key(dataset, "train")["n00000003_8"] == 3
    assert [c.id for c in dataset.manifest.classes] == [f"n{label:08d}" for label in range(5)]
    assert ShardStream(dataset, dataset.split("train")).read(0) == noise_image(0, 20, 18, "JPEG")


def test_a_data_set_is_indexed_once(tmp_path):
    said = []
    first = open_dataset(Location(str(timm_tree(tmp_path))), say=said.append)
    again = open_dataset(Location(str(tmp_path)), say=said.append)
    assert len(said) == 1
    assert first.manifest == again.manifest
    assert not list(tmp_path.glob(".pipeline/marks"))


def test_makeshards_and_variants_drop_in(tmp_path):
    """webdataset-examples makeshards: cls and jpg; others: jpeg, JPEG, png, webp, and folders in the key."""
    kinds = [("jpg", "JPEG"), ("jpeg", "JPEG"), ("JPEG", "JPEG"), ("png", "PNG"), ("webp", "WEBP")]
    members = []
    for number, (suffix, kind) in enumerate(kinds):
        members += [(f"a.b/{number:04d}.cls", f"{number % 2}\n".encode())]
        members += [(f"a.b/{number:04d}.{suffix}", noise_image(number, 9, 8, kind))]
    write_tar(tmp_path / "imagenet-train-000000.tar", members)
    write_tar(tmp_path / "imagenet-val-000000.tar", members)
    dataset = opened(tmp_path)
    assert labels_by_key(dataset, "val") == {f"a.b/{n:04d}": n % 2 for n in range(5)}
    stream = ShardStream(dataset, dataset.split("val"))
    assert [stream.read(n) for n in range(5)] == [noise_image(n, 9, 8, kind) for n, (_, kind) in enumerate(kinds)]


def test_a_label_may_stand_in_json_alone(tmp_path):
    write_tar(tmp_path / "00000.tar", [("0.jpg", noise_image(0, 9, 8, "JPEG")), ("0.json", b'{"label": 4}')])
    assert labels_by_key(opened(tmp_path, train="00000.tar"), "train") == {"0": 4}


def test_patterns_choose_shards_by_braces_and_globs(tmp_path):
    for number in range(4):  # img2dataset's names say no split
        write_tar(tmp_path / f"{number:05d}.tar", [m for i in range(3) for m in timm_sample(number * 3 + i, i)])
    dataset = opened(tmp_path, train="{00000..00002}.tar", val="*3.tar")
    assert [e.shard for e in dataset.manifest.splits["train"]] == ["00000.tar", "00001.tar", "00002.tar"]
    assert [e.shard for e in dataset.manifest.splits["val"]] == ["00003.tar"]
    for where, message in (
        ({}, r"00000\.tar: its name says neither train nor val; say which shards are which, data\.train"),
        ({"train": "{00000..00009}.tar"}, r"00004\.tar does not exist; bring the shard, or leave it out"),
        ({"train": "x*.tar"}, r"data\.train = 'x\*\.tar': nothing in .* is called x\*\.tar"),
        ({"train": "{0..2.tar"}, r"data\.train = .* has a brace that does not close"),
        ({"train": "../*.tar"}, r"leads out of data\.root"),
        ({"train": "00000.tar", "val": "00000.tar"}, r"00000\.tar is named for training and for validation"),
        ({"train": "{00000,00000}.tar"}, r"00000\.tar is named twice"),
    ):
        with pytest.raises(DataError, match=message):
            opened(tmp_path, **where)


@pytest.mark.parametrize("name", ["train-0.tar.gz", "train-0.tgz"])
def test_a_compressed_tar_is_refused_with_the_command_that_unpacks_it(tmp_path, name):
    plain = write_tar(tmp_path / "plain.tar", timm_sample(0, 1))
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / name).write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(DataError, match=r"is compressed.*unpack all: gunzip ") as refused:
        opened(shards)
    command = str(refused.value).partition("unpack all: ")[2]
    subprocess.run(["/bin/sh", "-c", command], check=True)
    assert labels_by_key(opened(shards), "train") == {"n00000001_0": 1}


def test_a_compressed_tar_that_is_called_tar_is_refused_too(tmp_path):
    plain = write_tar(tmp_path / "plain", timm_sample(0, 1))
    (tmp_path / "train-0.tar").write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(DataError, match=r"train-0\.tar is compressed, .*; gunzip it"):
        opened(tmp_path)


def test_a_dali_index_is_written_and_one_that_differs_is_refused(tmp_path):
    shard = write_tar(tmp_path / "train-0.tar", timm_sample(0, 1) + timm_sample(1, 0))
    opened(tmp_path)
    first, *lines = (tmp_path / ".pipeline" / "train-0.idx").read_text().splitlines()
    assert first == "v1.2 2"
    raw = shard.read_bytes()
    for line, number in zip(lines, range(2), strict=True):
        words = line.split()
        assert [words[i] for i in range(0, len(words), 4)] == ["cls", "jpg", "json"]
        offset, size = int(words[5]), int(words[6])
        assert raw[offset : offset + size] == noise_image(number, 20, 18, "JPEG")
    shutil.copy(tmp_path / ".pipeline" / "train-0.idx", tmp_path)  # as its publisher would give it
    write_tar(shard, timm_sample(0, 1))  # a shorter one under the same name, as a broken download leaves
    with pytest.raises(DataError, match=r"train-0\.idx lists 6 members, of which 3 are among the 3 of train-0\.tar"):
        open_dataset(Location(str(tmp_path)), again=True, **quiet)


def test_an_energon_index_that_differs_is_refused(tmp_path):
    shard = write_tar(tmp_path / "train-0.tar", timm_sample(0, 1) + timm_sample(1, 0))
    with tarfile.open(shard) as tar:
        starts = [m.offset for m in tar.getmembers() if m.name.endswith(".cls")]
    noted = tmp_path / "train-0.tar.idx"
    np.array([*starts, shard.stat().st_size], "<u8").tofile(noted)
    assert opened(tmp_path).manifest.count("train") == 2
    np.array([*starts, 5120, 10240], "<u8").tofile(noted)
    with pytest.raises(DataError, match=r"train-0\.tar\.idx lists 4 samples, train-0\.tar holds 2"):
        open_dataset(Location(str(tmp_path)), again=True, **quiet)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.jpg", b"x")], "sample 0 has neither cls nor a label in json"),
        ([("0.jpg", b"x"), ("0.cls", b"cat")], "sample 0 has label 'cat', which is no whole number"),
        ([("0.jpg", b"x"), ("0.json", b"{")], r"0\.json is no JSON"),
        ([("0.cls", b"1")], "sample 0 has no image of jpg, jpeg, png, webp"),
        ([("0.jpg", b"x"), ("0.png", b"x"), ("0.cls", b"1")], r"sample 0 has 2 images \(0\.jpg, 0\.png\)"),
        ([("0.jpg", b"x"), ("0.cls", b"-1")], "label -1 of 0 is negative"),
        ([("0.jpg", b"x"), ("0.json", b'{"label": 1.9}')], "label 1.9, which is no whole number"),
        ([("0.jpg", b"x"), ("0.json", b'{"label": true}')], "label True, which is no whole number"),
        ([("0.jpg", b"x"), ("0.json", b'{"label": Infinity}')], "label inf, which is no whole number"),
        ([("0.jpg", b"x"), ("0.json", b"[" * 100_000)], r"0\.json is no JSON"),
        ([("0.jpg", b"x"), ("0.cls", b"300000000")], "label 300000000 of 0 is no class; labels count"),
        ([*timm_sample(0, 1), *timm_sample(1, 1), timm_sample(0, 1)[0]], "members of n00000001_0 do not lie side by"),
        ([("README", b"x")], "holds no image"),
        ([("0.jpg", b"x"), ("0.json", b'{"label": 0, "class": "a"}'), ("1.jpg", b"x"),
          ("1.json", b'{"label": 0, "class": "b"}')], "label 0 of 1 stands for b and for a"),
    ],
)  # fmt: skip
def test_a_shard_that_cannot_be_used_is_named_with_its_sample(tmp_path, members, message):
    write_tar(tmp_path / "train-0.tar", members)
    with pytest.raises(DataError, match=rf"train-0\.tar.*{message}"):
        opened(tmp_path)


def test_labels_in_the_devkits_order_are_remarked_on(tmp_path):
    said = []
    members = [(f"{i}.jpg", noise_image(i, 9, 8)) if j else (f"{i}.json", json.dumps(
        {"label": i, "filename": f"n0000000{9 - i}_1.JPEG"}).encode()) for i in range(3) for j in range(2)]  # fmt: skip
    write_tar(tmp_path / "train-0.tar", members)
    open_dataset(Location(str(tmp_path)), say=said.append)
    assert any("labels do not follow the sorted WNIDs (0 is n00000009)" in line for line in said)


def test_fewer_samples_than_the_publisher_states_are_named(tmp_path):
    root = timm_tree(tmp_path)
    write_tar(root / "imagenet1k-train-0001.tar", timm_sample(7, 2))
    with pytest.raises(
        DataError, match=r"imagenet1k-train-0001\.tar holds 1 samples, _info\.json says 7; fetch it again"
    ):
        opened(root)
    (root / "imagenet1k-train-0001.tar").unlink()
    with pytest.raises(DataError, match=r"_info\.json names imagenet1k-train-0001\.tar, which is not there; fetch"):
        opened(root)


def test_shards_that_may_only_be_read_are_indexed_in_the_cache(tmp_path, monkeypatch):
    root = timm_tree(tmp_path / "shards")
    before = {path: path.read_bytes() for path in root.iterdir()}
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    dataset = opened(root, cache=str(tmp_path / "cache"))
    assert dataset.manifest.count("train") == 21
    assert dataset.directory.is_relative_to(tmp_path / "cache")
    assert {path: path.read_bytes() for path in root.iterdir()} == before


def test_an_interrupted_index_goes_on_where_it_stopped(tmp_path):
    root = timm_tree(tmp_path)

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_dataset(Location(str(root)), progress=stop, **quiet)
    seen = []
    open_dataset(Location(str(root)), progress=lambda done, total: seen.append((done, total)), **quiet)
    assert seen == [(2, 4), (3, 4), (4, 4)]


def test_workers_give_the_same_index(tmp_path):
    one, two = timm_tree(tmp_path / "one"), timm_tree(tmp_path / "two")
    opened(one)
    open_dataset(Location(str(two)), workers=2, **quiet)
    for name in ("dataset.json", "train.samples.npy", "val.samples.npy"):
        assert (one / ".pipeline" / name).read_bytes() == (two / ".pipeline" / name).read_bytes()


def _open(root: str, said: str) -> None:
    with Path(said).open("a") as file:
        open_dataset(Location(root), say=lambda text: print(text, file=file))


def test_of_two_processes_one_indexes_and_the_other_waits(tmp_path):
    root, said = timm_tree(tmp_path / "shards"), tmp_path / "said"
    processes = [get_context("spawn").Process(target=_open, args=(str(root), str(said))) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(said.read_text().splitlines()) == 1


def test_a_packed_set_that_lost_its_manifest_is_indexed_again(shards, tmp_path):
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    (copy / "dataset.json").unlink()
    found, packed = opened(copy), opened(shards)
    assert found.manifest.splits == packed.manifest.splits
    assert [c.id for c in found.manifest.classes] == [c.id for c in packed.manifest.classes]


def test_shards_that_came_later_or_changed_are_named(tmp_path):
    root = timm_tree(tmp_path, info=False)
    opened(root).check_shards()
    write_tar(root / "imagenet1k-train-0003.tar", timm_sample(99, 1))
    with pytest.raises(
        DataError, match=r"imagenet1k-train-0003\.tar came after .* was indexed; run `pipeline shards index"
    ):
        opened(root).check_shards()
    (root / "imagenet1k-train-0003.tar").unlink()
    write_tar(root / "imagenet1k-train-0002.tar", [m for i in range(30) for m in timm_sample(i, 1)])
    with pytest.raises(DataError, match=r"dataset\.json says .*; if it was changed on purpose, `pipeline shards index"):
        opened(root).check_shards()


def test_an_index_in_a_place_that_may_only_be_read_serves(tmp_path, monkeypatch):
    root = timm_tree(tmp_path)
    opened(root)
    monkeypatch.setattr("pipeline.data.dataset.alone", lambda directory: pytest.fail("no lock can be taken there"))
    assert opened(root).manifest.count("train") == 21


def test_of_windows_no_more_shards_stay_open_than_are_read(tmp_path):
    dataset = opened(timm_tree(tmp_path))
    stream = ShardStream(dataset, dataset.split("train"), keep=2)
    for sample in range(21):
        stream.read(sample)
    assert len(stream._files) == 2


def test_shards_that_were_changed_on_purpose_are_indexed_again(tmp_path):
    root = timm_tree(tmp_path, info=False)
    opened(root)
    write_tar(root / "imagenet1k-train-0002.tar", [m for i in range(30) for m in timm_sample(i, i % 5)])
    again = open_dataset(Location(str(root)), again=True, **quiet)
    again.check_shards()
    assert again.manifest.count("train") == 44


def test_names_with_spaces_are_indexed_and_indexed_again(tmp_path):
    members = [(name.replace("n", "a n"), content) for name, content in timm_sample(0, 1)]
    write_tar(tmp_path / "train-0.tar", members)
    for again in (False, True):
        assert open_dataset(Location(str(tmp_path)), again=again, **quiet).manifest.count("train") == 1


def test_shards_of_like_names_do_not_take_each_others_index(tmp_path):
    write_tar(tmp_path / "train/0.tar", timm_sample(0, 1))
    write_tar(tmp_path / "train__0.tar", timm_sample(1, 2) + timm_sample(2, 3))
    dataset = opened(tmp_path)
    assert labels_by_key(dataset, "train") == {"n00000001_0": 1, "n00000002_1": 2, "n00000003_2": 3}
    assert [e.count for e in dataset.manifest.splits["train"]] == [1, 2]


def test_lost_tables_of_a_packed_set_are_made_anew(shards, tmp_path):
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    (copy / "train.samples.npy").unlink()
    with pytest.raises(DataError, match=r"run `pipeline shards index"):
        opened(copy).split("train")
    again = open_dataset(Location(str(copy)), again=True, **quiet)
    assert len(again.split("train")) == 130
    assert (copy / "train.samples.npy").read_bytes() == (shards / "train.samples.npy").read_bytes()


def test_a_table_that_is_made_anew_while_it_is_in_use_is_refused_by_those_who_come_later(tmp_path):
    root = timm_tree(tmp_path, info=False)
    split = pickle.dumps(opened(root).split("train"))
    write_tar(root / "imagenet1k-train-0000.tar", timm_sample(99, 1))
    open_dataset(Location(str(root)), again=True, **quiet)
    with pytest.raises(DataError, match="was made anew while it is in use; start the run again"):
        pickle.loads(split)


@pytest.mark.parametrize("field", [(124, b"x" * 8), (124, b"\xff" * 12), (345, b"\xff" * 100)])
def test_no_damaged_header_is_a_traceback(tmp_path, field):
    shard = write_tar(tmp_path / "train-0.tar", timm_sample(0, 1) + timm_sample(1, 0))
    raw, (place, content) = bytearray(shard.read_bytes()), field
    header = raw[1024 : 1024 + 512]
    header[place : place + len(content)] = content
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)  # a checksum that fits
    raw[1024 : 1024 + 512] = header
    shard.write_bytes(raw)
    with pytest.raises(DataError, match=r"train-0\.tar"):
        opened(tmp_path)
