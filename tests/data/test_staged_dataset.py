"""A staged data set is the data set: the same batches, each shard copied once; and staging is never what ends a run."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.data.dataset import Dataset, Location, open_dataset
from pipeline.data.shards import DataError
from pipeline.data.stream import ShardStream
from tests.data.test_cache import until
from tests.data.test_dataset import timm_tree
from tests.data.test_directory import Slow
from tests.data.test_remote_dataset import Watch, end, epochs, held, image_data, limit_of, same, samples

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def root(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "root"))


def staged(root: Path, place: Path, **where) -> Dataset:
    """Whose origin writes down what is copied."""
    location = Location(str(root), cache=str(place / "cache"), stage=True, **where)
    dataset = open_dataset(location, say=lambda text: None)
    return replace(dataset, cache=replace(dataset.cache, origin=Slow(str(root), log=str(place / "log"))))


def local(root: Path) -> Dataset:
    return open_dataset(Location(str(root)), say=lambda text: None)


def copies(dataset: Dataset) -> list[str]:
    return sorted(name for name, start in dataset.cache.origin.copies if start == 0)


def names(dataset: Dataset) -> list[str]:
    return sorted(entry.shard for entries in dataset.manifest.splits.values() for entry in entries)


@pytest.mark.parametrize(("window", "workers"), [(0, 0), (1, 0), (2, 2)])
def test_staged_batches_are_those_of_the_root_to_the_bit_and_each_shard_is_copied_once(root, tmp_path, window, workers):
    dataset = staged(root, tmp_path)
    assert same(epochs(dataset, 2, window=window, workers=workers), epochs(local(root), 2, window=window))
    assert copies(dataset) == names(dataset)
    assert same(epochs(dataset, 1, window=window), epochs(local(root), 1, window=window))  # another run on this node
    assert copies(dataset) == names(dataset)


def test_a_small_cache_is_enough_and_never_exceeded(root, tmp_path):
    dataset = staged(root, tmp_path, cache_bytes=limit_of(root, 1))
    with Watch(dataset) as watch:
        assert same(epochs(dataset, 3, window=1, workers=2), epochs(local(root), 3, window=1))
    assert 0 < watch.most <= limit_of(root, 1) < sum(path.stat().st_size for path in root.glob("*.tar"))


def test_shards_are_staged_before_they_are_asked_for_in_the_order_of_their_use(root, tmp_path):
    dataset = staged(root, tmp_path)
    data = image_data(dataset, window=1)
    order = data.train_loader.shares.order
    entries = dataset.manifest.splits["train"]
    next(iter(data.train_dataloader()))
    until(lambda: len(dataset.cache.origin.copies) >= 2)
    first = {name for name, _ in dataset.cache.origin.copies[:2]}  # of them one may be its reader's, a moment later
    assert first == {entries[shard].shard for shard in order.shards_from(0, 0)[:2]}
    end(data)


def test_tars_of_others_are_staged_as_they_are(tmp_path):
    root = timm_tree(tmp_path / "root")
    dataset = staged(root, tmp_path)
    assert samples(dataset, "train") == samples(local(root), "train")
    assert copies(dataset) == sorted(entry.shard for entry in dataset.manifest.splits["train"])


def test_the_index_of_a_staged_read_only_root_outlives_the_disk_of_the_job(tmp_path, monkeypatch):
    root = timm_tree(tmp_path / "root")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("pipeline.data.dataset.os.access", lambda path, mode: False)
    said: list[str] = []
    for job in ("1", "2"):
        open_dataset(Location(str(root), cache=str(tmp_path / job), stage=True), say=said.append)
    assert [line.split(" into ")[1].startswith(f"{tmp_path}/home/pipeline/indexes/") for line in said] == [True]


def full(dataset: Dataset, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """A disk that has no more room once so many bytes are in the cache."""

    def usage(path: Path) -> tuple[int, int, int]:
        return shutil._ntuple_diskusage(10 * room, 0, max(0, room - held(dataset)))

    monkeypatch.setattr("pipeline.data.cache.shutil.disk_usage", usage)


def warned(dataset: Dataset, **batching: int) -> tuple[list, list[str]]:
    """Two epochs, and what was said of them."""
    data, said = image_data(dataset, **batching), []
    data.train_loader.read_ahead.warn = said.append
    try:
        return [b for _ in range(2) for b in data.train_dataloader()] + list(data.val_dataloader()), said
    finally:
        end(data)


def test_what_finds_no_room_on_the_node_is_read_where_it_lies_and_said_once(root, tmp_path, monkeypatch):
    dataset = staged(root, tmp_path)
    full(dataset, monkeypatch, 3 * max(entry.bytes for entry in dataset.manifest.splits["train"]))
    batches, said = warned(dataset)
    assert same(batches, epochs(local(root), 2))
    assert said == [
        f"WARNING: not staged, but read where it lies: {tmp_path}/cache/shards: No space left on device; free some "
        "space, set a limit for the cache, or give it another directory"
    ]
    assert 3 <= len(copies(dataset)) < len(names(dataset))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_that_cannot_be_written_is_said_at_the_start_and_does_without(root, tmp_path, workers):
    (tmp_path / "cache").write_text("a file")
    dataset = staged(root, tmp_path)
    assert dataset.streaming(2)[1:] == [
        f"{tmp_path}/cache/shards cannot be written (Not a directory): what is not here is read where it lies; give "
        "another directory, data.cache"
    ]
    batches, said = warned(dataset, workers=workers)
    assert same(batches, epochs(local(root), 2))
    assert [line.partition("; ")[0] for line in said] == [
        f"WARNING: not staged, but read where it lies: {tmp_path}/cache/shards: Not a directory"
    ]


def test_a_damaged_shard_gives_the_batches_that_it_gives_without_staging(root, tmp_path):
    shard = root / "train-000002.tar"
    content = bytearray(shard.read_bytes())
    split = local(root).split("train")
    first = next(n for n in range(len(split)) if split.entries[int(split.shard_S[n])].shard == shard.name)
    content[int(split.offset_S[first]) + 50] ^= 1
    shard.write_bytes(content)
    dataset = staged(root, tmp_path)
    batches, said = warned(dataset)
    assert same(batches, epochs(local(root), 2))
    assert [f"{shard}: content differs from the manifest" in line for line in said] == [True] * len(said)
    assert len(said) in (1, 2)  # found by a copy, and remembered by the next
    assert copies(dataset).count(shard.name) == 1
    assert not list((tmp_path / "cache" / "shards").glob(f"*{shard.name}"))


def test_a_copy_that_its_disk_has_lost_gives_way_to_the_original(root, tmp_path):
    dataset = staged(root, tmp_path)
    assert same(epochs(dataset, 2), epochs(local(root), 2))
    for number, copy in enumerate(sorted((tmp_path / "cache" / "shards").iterdir())):
        content = bytes(copy.stat().st_size)  # of the same length: its name and length are those of a whole one
        copy.write_bytes(content if number % 2 else content[: len(content) // 2])
    batches, said = warned(dataset, workers=2)
    assert same(batches, epochs(local(root), 2))
    assert said == []


def test_what_was_staged_is_read_though_the_root_has_lost_it_and_what_was_not_is_named(root, tmp_path):
    dataset = staged(root, tmp_path)
    whole = samples(dataset, "train")
    for shard in root.glob("*.tar"):
        shard.rename(tmp_path / shard.name)
    assert samples(dataset, "train") == whole
    with pytest.raises(DataError, match=rf"^{root}/val-000000\.tar: No such file or directory; it was there at the"):
        samples(dataset, "val")
    for shard in tmp_path.glob("*.tar"):
        shard.rename(root / shard.name)
    assert samples(dataset, "val") == samples(local(root), "val")


def test_a_lost_or_changed_shard_is_refused_at_the_start_as_without_staging(root, tmp_path):
    staged(root, tmp_path).check_shards()
    os.truncate(root / "train-000001.tar", 1000)
    with pytest.raises(DataError, match=r"train-000001\.tar has 1000 bytes, dataset\.json says"):
        staged(root, tmp_path).check_shards()
    (root / "val-000000.tar").unlink()
    with pytest.raises(DataError, match=r"lacks val-000000\.tar"):
        staged(root, tmp_path).check_shards()


def test_a_look_at_a_few_images_copies_nothing(root, tmp_path):
    dataset = staged(root, tmp_path)
    stream = ShardStream(dataset, dataset.split("train"), whole=False)
    assert [stream.read(n) for n in (0, 70, 129)] == [samples(local(root), "train")[n][2] for n in (0, 70, 129)]
    assert copies(dataset) == []


def test_the_start_says_what_is_staged_where_and_what_speaks_against_it(root, tmp_path, monkeypatch):
    dataset = staged(root, tmp_path)
    first, second, third = dataset.streaming(0)
    assert first == (
        f"staging {root}: 7 shards, 0.000625 GB, 0 GB of it here already; {tmp_path}/cache/shards keeps all of them"
    )
    assert "data.window = 0 shuffles over all 5 training shards" in second
    assert third == (
        f"{tmp_path}/cache/shards lies on the file system of {root}, so that staging gains nothing; give a disk of the "
        "node, data.cache"
    )
    full(dataset, monkeypatch, 1000)
    assert dataset.streaming(2)[2].endswith(
        "GB are to come: what finds no room is read where it lies; give another directory, data.cache, or a limit, "
        "data.cache_gb with data.window"
    )


def test_the_copying_of_the_first_window_is_followed(root, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.data.read_ahead._REPORT_SECONDS", 0.0)
    data, said = image_data(staged(root, tmp_path), window=3), []
    data.train_loader.read_ahead.say = said.append
    assert list(data.train_dataloader())
    end(data)
    assert said[1].startswith("staging the first window: 1 of 3 shards, 0.0001")


def test_a_cache_is_named_by_variables_of_the_node(root, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "job"))
    monkeypatch.setenv("WHO", "me")
    for text in ("$SLURM_TMPDIR/$WHO", "${SLURM_TMPDIR}/${WHO}"):
        location = Location(str(root), cache=text, stage=True)
        assert open_dataset(location).cache.directory == tmp_path / "job" / "me" / "shards"
        assert location.cache == text
    monkeypatch.setenv("WHO", "$(touch hacked)")  # no shell reads it
    assert Location("", cache="/x/$WHO").cache_directory == Path("/x/$(touch hacked)")


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_that_is_not_set_is_refused_by_its_name(root, monkeypatch, value):
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    monkeypatch.delenv("ELSE", raising=False)
    if value is not None:
        monkeypatch.setenv("SLURM_TMPDIR", value)
    with pytest.raises(DataError) as caught:
        open_dataset(Location(str(root), cache="$SLURM_TMPDIR/${ELSE}", stage=True))
    assert str(caught.value) == (
        "data.cache = $SLURM_TMPDIR/${ELSE}: SLURM_TMPDIR and ELSE are not set on this node; set what is missing, "
        "or name the directory without it"
    )
    assert open_dataset(Location(str(root), cache="$SLURM_TMPDIR")).cache is None  # not needed, and not looked at
