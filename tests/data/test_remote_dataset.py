"""A data set behind a URL is the data set: the same bytes, the same batches, each file fetched once, faults named."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.cli.settling import settle
from pipeline.config import ConfigError, compose_config
from pipeline.data.augment import Augmentation, CentreCrop
from pipeline.data.batch import Batch
from pipeline.data.datamodule import ImageData
from pipeline.data.dataset import Dataset, Location, open_dataset
from pipeline.data.description import contact_sheet, describe
from pipeline.data.loader import Batching
from pipeline.data.read_ahead import check_room
from pipeline.data.shards import MANIFEST, DataError, ShardEntry, read_manifest
from pipeline.data.stream import ShardStream
from pipeline.data.verification import verify
from pipeline.data.writer import write_shards
from tests.conftest import make_folders
from tests.data.faulty_server import Fault, FaultyServer, faulty_server
from tests.data.test_cache import until
from tests.data.test_dataset import timm_sample, timm_tree, write_tar

pytestmark = pytest.mark.timeout(60)
SHARD = "/set/train-000002.tar"


def put(server: FaultyServer, root: Path) -> None:
    """Serve all files of a directory under /set."""
    paths = [path for path in root.rglob("*") if path.is_file()]
    server.files = {f"/set/{path.relative_to(root).as_posix()}": path.read_bytes() for path in paths}


@pytest.fixture
def server(shards: Path) -> Iterator[FaultyServer]:
    with faulty_server() as server:
        put(server, shards)
        yield server


def opened(server: FaultyServer, cache: Path, *, say: Callable[[str], None] = lambda text: None, **where) -> Dataset:
    again = where.pop("again", False)
    dataset = open_dataset(Location(f"{server.url}/set", cache=str(cache), **where), again=again, say=say)
    return replace(dataset, cache=replace(dataset.cache, wait=0.01))


def tars(server: FaultyServer) -> list[str]:
    return sorted(name for name in server.files if name.endswith(".tar"))


def samples(dataset: Dataset, split: str) -> list[tuple[str, int, bytes]]:
    stream = ShardStream(dataset, dataset.split(split))
    read = [
        (stream.split.key(n), int(stream.split.label_S[n]), stream.read(n)) for n in range(len(stream.split))
    ]  # fmt: skip
    stream.close()
    return read


def test_a_packed_set_is_read_as_it_is_on_disk_and_nothing_is_fetched_twice(server, shards, tmp_path):
    for _ in range(2):
        dataset = opened(server, tmp_path)
        for split in ("train", "val"):
            assert samples(dataset, split) == samples(open_dataset(Location(str(shards))), split)
    for name in [*tars(server), "/set/train.samples.npy", "/set/val.samples.npy"]:
        assert server.sent(name) == len(server.files[name]), name
        assert len(server.gets(name)) == 1
    assert len(server.gets("/set/dataset.json")) == 2  # which may have changed


def other_shards(directory: Path) -> Path:
    """The same data set with another image in its first training shard."""
    folders = make_folders(directory / "source")
    picture = folders / "train" / "class0" / "000.png"
    picture.write_bytes((folders / "val" / "class0" / "000.png").read_bytes())
    write_shards(str(folders), directory / "shards", samples_per_shard=30)
    return directory / "shards"


def test_a_resumed_run_refuses_a_set_that_was_changed_on_the_server_and_names_the_shard(server, tmp_path):
    words = ["data=folder", f"data.root={server.url}/set", f"data.cache={tmp_path / 'cache'}", f"run.dir={tmp_path}",
             "run.id=a", "data.global_batch_size=24"]  # fmt: skip
    config, dataset = settle(compose_config(words))
    config.directory.mkdir()
    shutil.copy(dataset.directory / MANIFEST, config.directory)
    running = dataset.split("train")
    put(server, other_shards(tmp_path))
    with pytest.raises(
        DataError, match=r"holds another data set than this run began with \(train-00000\d\.tar changed\)"
    ):
        settle(config)
    again = opened(server, tmp_path / "cache")
    assert again.manifest.digest != dataset.manifest.digest
    assert again.directory != dataset.directory
    running.__setstate__(running.__getstate__())  # as a worker does that starts now: it maps the run's own table
    assert running.digest(0) == dataset.split("train").digest(0)
    assert len(dataset.split("val")) == 35


def test_where_the_variables_of_nodes_are_not_set_tables_go_to_the_default_cache(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    config = compose_config(["data=folder", f"data.root={server.url}/set", "data.cache=$SLURM_TMPDIR",
                             "data.stage=true", "data.global_batch_size=24"])  # fmt: skip
    settled, dataset = settle(config, elsewhere=True)
    assert dataset.directory.is_relative_to(tmp_path / "home" / "pipeline")
    assert (settled.data.cache, settled.data.digest) == ("$SLURM_TMPDIR", dataset.manifest.digest)
    with pytest.raises(ConfigError, match=r"^data\.cache = \$SLURM_TMPDIR: SLURM_TMPDIR is not set on this node; set"):
        settle(config)
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "job"))
    assert settle(config)[1].directory.is_relative_to(tmp_path / "job")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "dataset.json",
            b"<html>Not here</html>",
            r"/set/dataset\.json: damaged, its content does not fit its checksum",
        ),
        ("train.samples.npy", b"cut", r"/set/train\.samples\.npy: content differs from the manifest"),
        ("val.samples.npy", None, r"/set/val\.samples\.npy: not found \(404\)"),
    ],
)
def test_a_manifest_or_table_that_is_none_is_named_by_its_url_and_mended_by_a_sound_one(
    server, shards, tmp_path, name, content, message
):
    sound = server.files.pop(f"/set/{name}")
    if content is not None:
        server.files[f"/set/{name}"] = content
    with pytest.raises(DataError, match=f"{server.url}{message}"):
        opened(server, tmp_path)
    server.files[f"/set/{name}"] = sound
    assert opened(server, tmp_path).manifest == read_manifest(shards)


def test_a_split_that_is_a_path_is_refused(server, tmp_path, shards):
    from pipeline.data.shards import write_manifest

    manifest = read_manifest(shards)
    write_manifest(tmp_path, manifest.classes, manifest.splits, {"../../train": "0" * 64}, "")
    server.files["/set/dataset.json"] = (tmp_path / MANIFEST).read_bytes()
    with pytest.raises(DataError, match=r"/set/dataset\.json: splits .* one is no plain word"):
        opened(server, tmp_path / "cache")


PATTERNS = {"train": "imagenet1k-train-{0000..0002}.tar", "val": "imagenet1k-validation-00.tar"}


@pytest.mark.parametrize(("info", "patterns"), [(False, PATTERNS), (True, PATTERNS), (True, {})])
def test_tars_of_others_are_indexed_through_the_cache_once(server, tmp_path, info, patterns):
    put(server, timm_tree(tmp_path / "set", info))
    said: list[str] = []
    for _ in range(2):
        dataset = opened(server, tmp_path / "cache", say=said.append, **patterns)
        assert {s: dataset.manifest.count(s) for s in dataset.manifest.splits} == {"train": 21, "val": 7}
        assert [sample[:2] for sample in samples(dataset, "train")][8] == ("n00000003_8", 3)
    assert len(said) == 1
    for name in tars(server):
        assert server.sent(name) == len(server.files[name])


def test_without_patterns_and_info_http_has_no_listing_and_the_way_out_is_named(server, tmp_path):
    put(server, timm_tree(tmp_path / "set", info=False))
    with pytest.raises(
        DataError,
        match=rf"{server.url}/set holds neither dataset\.json nor _info\.json, and HTTP has no listing; check the URL, "
        r"or give data\.train and data\.val as brace patterns",
    ):
        opened(server, tmp_path / "cache")
    with pytest.raises(DataError, match=r"HTTP has no listing; give data\.train and data\.val as brace patterns"):
        opened(server, tmp_path / "cache", train="*train*.tar")


def test_indexing_anew_sees_what_was_changed_on_the_server(server, tmp_path):
    put(server, timm_tree(tmp_path / "set", info=False))
    before = opened(server, tmp_path / "cache", **PATTERNS)
    content = [member for n in range(7) for member in timm_sample(100 + n, n % 5)]
    shard = write_tar(tmp_path / "new.tar", content).read_bytes()
    server.files["/set/imagenet1k-train-0001.tar"] = shard
    after = opened(server, tmp_path / "cache", again=True, **PATTERNS)
    assert before.manifest.digest != after.manifest.digest
    assert samples(after, "train")[7][0] == "n00000000_100"


def test_indexing_goes_on_where_it_was_stopped_and_fetches_nothing_again(server, tmp_path):
    put(server, timm_tree(tmp_path / "set", info=False))
    server.fail("/set/imagenet1k-train-0002.tar", Fault(status=403))
    with pytest.raises(DataError, match=r"imagenet1k-train-0002\.tar: access refused"):
        opened(server, tmp_path / "cache", **PATTERNS)
    opened(server, tmp_path / "cache", again=True, **PATTERNS)  # as `shards index` asks
    assert [len(server.gets(name)) for name in tars(server)] == [1, 1, 2, 1]


def test_a_cache_of_one_shard_is_enough_to_index_and_to_verify(server, tmp_path):
    put(server, timm_tree(tmp_path / "set", info=False))
    limit = max(len(server.files[name]) for name in tars(server))
    location = Location(f"{server.url}/set", **PATTERNS, cache=str(tmp_path / "cache"), cache_bytes=limit)
    dataset = open_dataset(location, workers=2, say=lambda text: None)
    report = verify(dataset, decode_images=True, workers=3)
    assert (report.faults, report.samples) == ([], 28)
    assert held(dataset) <= limit


def test_verifying_names_a_shard_that_the_server_has_changed(server, tmp_path):
    dataset = opened(server, tmp_path)
    server.files[SHARD] = bytes(len(server.files[SHARD]))
    assert [f"{server.url}{SHARD}: content differs" in fault for fault in verify(dataset).faults] == [True]


def test_looking_at_a_set_fetches_the_images_that_are_looked_at_and_no_whole_shard(server, shards, tmp_path):
    dataset, local = opened(server, tmp_path), open_dataset(Location(str(shards)))
    assert contact_sheet(dataset, "train").tobytes() == contact_sheet(local, "train").tobytes()
    assert sum(server.sent(name) for name in tars(server)) < sum(len(server.files[name]) for name in tars(server)) / 4
    assert describe(dataset) == describe(local)
    assert held(dataset) == 0
    server.fail(SHARD, Fault(whole=True), forever=True)  # a server without ranges sends the shard
    assert describe(dataset) == describe(local)
    assert held(dataset) == len(server.files[SHARD])


def image_data(dataset: Dataset, **batching: int) -> ImageData:
    return ImageData(
        dataset,
        num_classes=5,
        augment=Augmentation(16),
        crop=CentreCrop(16, 1.0),
        batching=Batching(**{"global_batch_size": 24, "window": 1, **batching}),
    )


def epochs(dataset: Dataset, count: int = 1, **batching: int) -> list[Batch]:
    data = image_data(dataset, **batching)
    try:
        return [batch for _ in range(count) for batch in data.train_dataloader()] + list(data.val_dataloader())
    finally:
        end(data)


def end(data: ImageData) -> None:
    """Torch waits five seconds for each worker of a loader that is collected as garbage."""
    data.teardown("fit")
    iterator = data.train_loader.workers._loader._iterator
    if iterator is not None:
        iterator._shutdown_workers()


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)
    )


def held(dataset: Dataset) -> int:
    """Bytes of shards and partials in the cache."""
    total = 0
    for path in dataset.cache.directory.glob("*[!k]"):  # *.lock
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


class Watch(threading.Thread):
    """The most that a cache has held."""

    def __init__(self, dataset: Dataset):
        super().__init__(daemon=True)
        self.dataset, self.most, self.over = dataset, 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.001):
            self.most = max(self.most, held(self.dataset))

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()


def limit_of(shards: Path, window: int) -> int:
    """The least with which a window is accepted."""
    sizes = sorted((entry.bytes for entry in read_manifest(shards).splits["train"]), reverse=True)
    return sum(sizes[: 2 * window])


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of 51 kB in shards of 13: larger than what is lost of a body that breaks."""
    directory = tmp_path_factory.mktemp("large")
    for split, count in (("train", 12), ("val", 3)):
        for number in range(5 * count):
            pixels = np.random.default_rng([number, count]).integers(0, 256, (130, 130, 3), dtype=np.uint8)
            path = directory / "source" / split / f"class{number % 5}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    write_shards(str(directory / "source"), directory / "shards", samples_per_shard=13)
    return directory / "shards"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("window", [1, 2])
def test_under_faults_and_a_small_cache_batches_are_those_of_the_local_set_to_the_bit(
    server, large, tmp_path, workers, window
):
    put(server, large)
    local = epochs(open_dataset(Location(str(large))), 2, window=window)
    for number, name in enumerate(tars(server)):
        half = len(server.files[name]) // 2
        server.fail(
            name, *[Fault(status=500), Fault(cut=half), Fault(delay=0.1), Fault(cut=half, whole=True)][number % 4 :]
        )
    limit = limit_of(large, window)
    assert limit < sum(len(server.files[name]) for name in tars(server))
    dataset = opened(server, tmp_path, cache_bytes=limit)
    with Watch(dataset) as watch:
        assert same(epochs(dataset, 2, window=window, workers=workers), local)
    assert 0 < watch.most <= limit
    requests = [request for name in tars(server) for request in server.gets(name)]
    assert {200, 206, 500} == {request.status for request in requests}  # faults were met, and broken bodies continued


@pytest.mark.parametrize("window", [1, 2])
def test_the_smallest_cache_fetches_each_shard_once_an_epoch_and_before_it_is_needed(
    server, shards, tmp_path, window, monkeypatch
):
    dataset = opened(server, tmp_path, cache_bytes=limit_of(shards, window))
    data = image_data(dataset, window=window)
    order, shard_S = data.train_loader.shares.order, data.train_loader.images.split.shard_S
    names = [f"/set/{entry.shard}" for entry in dataset.manifest.splits["train"]]
    late = []
    for number, _ in enumerate(data.train_dataloader()):
        place = order.window_of(0, number * 24)
        coming = [names[s] for s in order.shards_from(0, place)][window : 2 * window]
        try:
            until(lambda coming=coming: all(server.gets(name) for name in coming), 5)  # with nobody asking
        except AssertionError:
            late.append((number, coming))
    data.teardown("fit")
    assert not late
    assert len(set(shard_S.tolist())) == 5
    assert max(len(server.gets(name)) for name in names) <= 2  # the second: of the next epoch's first windows
    read_again = order.shards_from(1, 0)[: 2 * window]
    assert all(len(server.gets(name)) == 1 for n, name in enumerate(names) if n not in read_again)


def test_the_next_epoch_goes_on_with_what_is_under_way(server, shards, tmp_path):
    for name in tars(server):
        server.fail(name, Fault(pace=0.05), forever=True)
    dataset = opened(server, tmp_path)
    assert len(epochs(dataset, 3, window=1)) > 15
    for name in tars(server):
        assert [request.start for request in server.gets(name)] == [0]
        assert server.sent(name) == len(server.files[name])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(lie=-1000), r"its length of \d+ bytes differs from the \d+ expected; bring the file back, or write"),
        (Fault(lie=1000), r"its length of \d+ bytes differs from the \d+ expected; bring the file back, or write"),
        (Fault(content=b"other"), r"content differs from the manifest \(sha256 .*\); bring the file back, or write"),
        (Fault(status=404), r"not found \(404\); check the name, or bring the file back"),
        (Fault(status=403), r"access refused; HTTP is read without credentials: make the file public"),
        (Fault(status=500), r"the server answered 500 \(8 attempts in a row, at byte 0 of \d+\); check the server and"),
        (Fault(cut=100), r"the body broke off \(8 attempts in a row, at byte 0 of \d+\); check the server and"),
    ],
)  # fmt: skip
def test_a_shard_that_cannot_be_had_stops_the_epoch_in_one_line_with_its_url(
    server, shards, tmp_path, fault, message, workers
):
    if fault.content is not None:
        fault = Fault(content=bytes(len(server.files[SHARD])))
    server.fail(SHARD, fault, forever=True)
    data = image_data(opened(server, tmp_path), workers=workers)
    batches, began = [], time.monotonic()
    with pytest.raises(DataError, match=rf"^{server.url}{SHARD}: {message}") as caught:
        batches.extend(data.train_dataloader())
    end(data)
    assert time.monotonic() - began < 30
    assert len(str(caught.value).splitlines()) == 1
    order = data.train_loader.shares.order
    assert len(batches) == order.shards_from(0, 0).index(2) * 30 // 24  # all before the shard were handed out


def test_a_cache_too_small_for_two_windows_is_refused_with_a_way_out_that_works():
    entries = [ShardEntry(f"{n}.tar", 1, size, "") for n, size in enumerate((123_456_789, 99_999_999, 50_000_000))]
    with pytest.raises(
        DataError,
        match=r"data\.cache_gb = 0\.22 is less than two windows of shards, 0\.274 \(a window is 3 of 3 shards\): .*; "
        r"set data\.cache_gb=0\.274 or, in a new run, data\.window=1 with data\.cache_gb=0\.224",
    ):
        check_room(220_000_000, entries, 0)
    check_room(224_000_000, entries, 1)
    with pytest.raises(DataError, match=r"or, in a new run, data\.window=1$"):
        check_room(224_000_000, entries, 2)
    check_room(274_000_000, entries, 0)
    check_room(0, entries, 0)


def test_what_is_to_come_is_said_before_it_does(server, shards, tmp_path, monkeypatch):
    dataset = opened(server, tmp_path)
    first, second = dataset.streaming(0)
    assert first.startswith(f"streaming {server.url}/set: 7 shards, ")
    assert first.endswith(f"{tmp_path}/shards keeps all of them")
    assert "data.window = 0 shuffles over all 5 training shards" in second
    assert len(dataset.streaming(2)) == 1
    monkeypatch.setattr("pipeline.data.cache.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))
    assert "free, and" in dataset.streaming(2)[1]
    for split in ("train", "val"):
        samples(dataset, split)
    assert len(dataset.streaming(0)) == 1
    assert open_dataset(Location(str(shards))).streaming(0) == []


def test_a_wait_for_a_server_is_said(server, tmp_path, caplog):
    server.fail(SHARD, *[Fault(status=503)] * 4)
    dataset = opened(server, tmp_path)
    samples(dataset, "train")
    assert len(caplog.records) == 2
    assert "the server answered 503 (3 of 8 attempts); again in" in caplog.text


def test_info_may_name_files_in_folders(server, tmp_path):
    put(server, timm_tree(tmp_path / "set", info=False))
    server.files = {name.replace("/set/", "/set/data/"): content for name, content in server.files.items()}
    names = [name.removeprefix("/set/") for name in tars(server)]
    splits = {"train": {"filenames": names[:3]}, "validation": {"filenames": names[3:]}}
    server.files["/set/_info.json"] = json.dumps({"splits": splits}).encode()
    assert opened(server, tmp_path / "cache").manifest.count("train") == 21
