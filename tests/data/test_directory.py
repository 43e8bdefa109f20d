"""Shards of a directory come to a node as those of a server do: each once, whole, verified, and resumed where cut."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.data import directory as directory_module
from pipeline.data.cache import Different, ShardCache
from pipeline.data.directory import Directory
from pipeline.data.remote import Body, Stopped
from pipeline.data.shards import DataError
from tests.data.test_cache import CONTENTS, FIRST, SHA256, SIZE, _in_processes, fetch, held, partials, until

pytestmark = pytest.mark.timeout(60)


@dataclass(frozen=True)
class Slow(Directory):
    """A directory that writes down what is copied of it and from which byte on, and takes its time."""

    log: str = ""
    pace: float = 0.0  # seconds a chunk

    def open(self, name: str, start: int = 0, stop: threading.Event | None = None) -> Body:
        with Path(self.log).open("a") as log:
            log.write(f"{name} {start}\n")
        body = super().open(name, start, stop)
        return Body(body.size, body.tag, self._slowly(body.chunks))

    def _slowly(self, chunks: Generator[bytes, None, None]) -> Generator[bytes, None, None]:
        for chunk in chunks:
            time.sleep(self.pace)
            yield chunk

    @property
    def copies(self) -> list[tuple[str, int]]:
        """Name and first byte of each."""
        lines = Path(self.log).read_text().splitlines() if Path(self.log).exists() else []
        return [(line.split()[0], int(line.split()[1])) for line in lines]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    for name, content in CONTENTS.items():
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones."""
    monkeypatch.setattr(directory_module, "_CHUNK", 64 * 1024)


def cache_of(root: Path, directory: Path, *, limit: int = 0, pace: float = 0.0) -> tuple[ShardCache, Slow]:
    slow = Slow(str(root), log=str(directory / "log"), pace=pace)
    return ShardCache(slow, directory / "cache", limit=limit, wait=0.01), slow


def test_a_file_is_read_from_any_byte_to_its_end(root, chunks):
    origin = Directory(str(root))
    assert origin.size(FIRST) == SIZE
    for start in (0, 1, 700_000, SIZE):
        body = origin.open(FIRST, start)
        assert body.size == SIZE
        assert b"".join(body.chunks) == CONTENTS[FIRST][start:]
    assert origin.read_range(FIRST, 1000, 2000) == CONTENTS[FIRST][1000:3000]


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../b", "", "a\nb"])
def test_no_name_leads_out_of_the_root(root, name):
    for use in (Directory(str(root)).size, Directory(str(root)).open, Directory(str(root)).version):
        with pytest.raises(DataError, match="must be a plain path below"):
            use(name)


def test_a_fault_of_the_source_names_the_file_and_not_the_cache(root, tmp_path):
    cache, _ = cache_of(root, tmp_path)
    (root / FIRST).unlink()
    with pytest.raises(DataError, match=rf"^{root}/{FIRST}: No such file or directory; see the file, its owner"):
        fetch(cache)
    (root / FIRST).mkdir()
    with pytest.raises(DataError, match=rf"^{root}/{FIRST}: Is a directory; "):
        fetch(cache)
    assert not held(cache)


def test_one_directory_by_two_names_is_one(root, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    assert {Directory(name).url("a") for name in ("root", "root/", "./link", str(root))} == {f"{root}/a"}


def test_processes_that_want_the_same_shards_copy_each_once(root, tmp_path):
    cache, slow = cache_of(root, tmp_path, pace=0.02)
    names = sorted(CONTENTS)
    assert _in_processes(cache, [names, names, names[::-1]]) == [8, 8, 8]
    assert sorted(slow.copies) == [(name, 0) for name in names]
    assert held(cache) == set(names)


KILLED = """
import sys, time
from pathlib import Path
from pipeline.data import directory
from pipeline.data.cache import ShardCache
from tests.data.test_directory import Slow
directory._CHUNK = 64 * 1024
root, place, log, size, sha256 = sys.argv[1:]
ShardCache(Slow(root, log=log, pace=0.05), Path(place)).fetch("000000.tar", size=int(size), sha256=sha256)
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_copy_whose_process_was_killed_is_continued_by_the_next(root, tmp_path, sign):
    cache, slow = cache_of(root, tmp_path, limit=SIZE)
    command = [sys.executable, "-c", KILLED, str(root), str(cache.directory), slow.log, str(SIZE), SHA256[FIRST]]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            until(lambda: any(p.stat().st_size > 500_000 for p in partials(cache)))
            process.send_signal(sign)
            assert process.wait(timeout=10) != 0
        finally:
            process.kill()
    [partial] = partials(cache)
    kept = partial.stat().st_size
    assert 500_000 < kept < SIZE
    assert fetch(cache).read_bytes() == CONTENTS[FIRST]
    assert slow.copies == [(FIRST, 0), (FIRST, kept)]


def test_a_stop_ends_a_copy_and_keeps_what_came(root, tmp_path, chunks):
    cache, _ = cache_of(root, tmp_path, pace=0.05)
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(Stopped):
        cache.fetch_if_idle(FIRST, size=SIZE, sha256=SHA256[FIRST], stop=stop)
    assert 0 < partials(cache)[0].stat().st_size < SIZE


def test_a_wrong_beginning_is_found_by_the_hash_and_copied_again(root, tmp_path):
    cache, slow = cache_of(root, tmp_path)
    cache.directory.mkdir()
    cache._named(FIRST, "partial").write_bytes(b"\0" * 1000)
    assert fetch(cache).read_bytes() == CONTENTS[FIRST]
    assert slow.copies == [(FIRST, 1000), (FIRST, 0)]


def test_a_copy_that_differs_from_the_manifest_is_never_used_and_made_once_until_the_file_changes(root, tmp_path):
    cache, slow = cache_of(root, tmp_path)
    damaged = bytearray(CONTENTS[FIRST])
    damaged[700_000] ^= 1
    (root / FIRST).write_bytes(damaged)
    for _ in range(3):
        with pytest.raises(Different, match=rf"^{root}/{FIRST}: content differs from the manifest"):
            fetch(cache)
        assert not held(cache)
        assert not partials(cache)
    assert slow.copies == [(FIRST, 0)]
    (root / FIRST).write_bytes(CONTENTS[FIRST])
    assert fetch(cache).read_bytes() == CONTENTS[FIRST]
    assert len(slow.copies) == 2
    assert len(list(cache.directory.iterdir())) == 1


def test_a_file_of_another_length_is_not_copied(root, tmp_path):
    cache, _ = cache_of(root, tmp_path)
    os.truncate(root / FIRST, SIZE - 1)
    with pytest.raises(Different, match=rf"its length of {SIZE - 1} bytes differs from the {SIZE} expected"):
        fetch(cache)
    assert not held(cache)


def test_a_file_cut_while_it_is_copied_is_named(root, tmp_path, chunks):
    cache, _ = cache_of(root, tmp_path, pace=0.02)
    threading.Timer(0.2, os.truncate, (root / FIRST, SIZE // 2)).start()
    with pytest.raises(Different, match=rf"its length of {SIZE // 2} bytes differs"):
        fetch(cache)
    assert not held(cache)


def test_a_disk_without_room_for_the_whole_shard_takes_no_byte_of_it(root, tmp_path, monkeypatch):
    cache, slow = cache_of(root, tmp_path)
    free = [SIZE - 1]
    monkeypatch.setattr(
        "pipeline.data.cache.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(2 * SIZE, SIZE, free[0])
    )
    with pytest.raises(DataError, match=r"No space left on device; free some space, set a limit for the cache, or"):
        fetch(cache)
    assert slow.copies == []
    assert not list(cache.directory.iterdir())
    free[0] = SIZE
    assert fetch(cache).read_bytes() == CONTENTS[FIRST]


def test_the_least_recently_used_copy_makes_room(root, tmp_path):
    cache, slow = cache_of(root, tmp_path, limit=2 * SIZE)
    names = sorted(CONTENTS)
    for name in (*names[:2], names[0], names[2]):
        assert hashlib.sha256(fetch(cache, name).read_bytes()).hexdigest() == SHA256[name]
    assert held(cache) == {names[0], names[2]}
    assert [name for name, _ in slow.copies] == names[:3]
