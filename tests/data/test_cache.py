from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.data import cache as cache_module
from pipeline.data.cache import Different, ShardCache
from pipeline.data.remote import NotFound, Remote, Stopped, Unavailable
from pipeline.data.shards import DataError
from tests.data.faulty_server import Fault, FaultyServer, faulty_server

pytestmark = pytest.mark.timeout(60)
SIZE = 1_500_000


def content_of(number: int) -> bytes:
    return random.Random(number).randbytes(SIZE)


CONTENTS = {f"{number:06d}.tar": content_of(number) for number in range(8)}
SHA256 = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENTS.items()}
FIRST = "000000.tar"


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with faulty_server() as server:
        server.files = {f"/set/{name}": content for name, content in CONTENTS.items()}
        yield server


def cache_of(
    server: FaultyServer, directory: Path, *, limit: int = 0, attempts: int = 3, part: str = "set"
) -> ShardCache:
    remote = Remote(f"{server.url}/{part}", attempts=3, wait=0.01, timeout=5.0)
    return ShardCache(remote, directory / "cache", limit=limit, attempts=attempts, wait=0.01)


def fetch(cache: ShardCache, name: str = FIRST) -> Path:
    return cache.fetch(name, size=SIZE, sha256=SHA256[name])


def partials(cache: ShardCache) -> list[Path]:
    return list(cache.directory.glob("*.partial"))


def until(true: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def test_a_shard_is_downloaded_once_and_then_read_from_disk(server, tmp_path):
    cache = cache_of(server, tmp_path)
    for _ in range(3):
        assert fetch(cache).read_bytes() == CONTENTS[FIRST]
    assert len(server.requests["/set/000000.tar"]) == 1
    assert len(list(cache.directory.iterdir())) == 1  # neither partial nor lock stays


def test_shards_of_one_name_under_two_urls_do_not_meet(server, tmp_path):
    server.files |= {"/train/000000.tar": b"train", "/val/000000.tar": b"val"}
    whole, train = cache_of(server, tmp_path, part=""), cache_of(server, tmp_path, part="train")
    paths = {whole.fetch("train/000000.tar"), whole.fetch("val/000000.tar"), train.fetch("000000.tar")}
    assert {p.read_bytes() for p in paths} == {b"train", b"val"}
    assert len(paths) == 2  # of three names of two URLs
    assert all(p.name.endswith("-000000.tar") for p in paths)


def test_a_shard_replaced_under_its_url_is_not_taken_for_the_new_one(server, tmp_path):
    cache = cache_of(server, tmp_path)
    old = fetch(cache)
    server.files["/set/000000.tar"] = CONTENTS["000001.tar"]
    new = cache.fetch(FIRST, size=SIZE, sha256=SHA256["000001.tar"])
    assert new.read_bytes() == CONTENTS["000001.tar"]
    assert old.read_bytes() == CONTENTS[FIRST]


def test_a_shard_damaged_on_disk_is_downloaded_again(server, tmp_path):
    cache = cache_of(server, tmp_path)
    os.truncate(fetch(cache), 1000)
    assert fetch(cache).read_bytes() == CONTENTS[FIRST]


def test_an_unknown_shard_is_taken_as_announced_and_found_again_by_its_hash(server, tmp_path):
    cache = cache_of(server, tmp_path)
    path = cache.fetch(FIRST)
    assert path.read_bytes() == CONTENTS[FIRST]
    assert cache.fetch(FIRST) == path
    assert fetch(cache) == path
    assert len(server.gets("/set/000000.tar")) == 1


def test_an_empty_file_is_a_file(server, tmp_path):
    server.files["/set/empty"] = b""
    assert cache_of(server, tmp_path).fetch("empty").read_bytes() == b""


def test_a_broken_body_is_continued_where_it_broke(server, tmp_path):
    server.fail("/set/000000.tar", Fault(cut=700_000), Fault(cut=500_000))
    assert fetch(cache_of(server, tmp_path)).read_bytes() == CONTENTS[FIRST]
    starts = [r.start for r in server.gets("/set/000000.tar")]
    assert starts[0] == 0
    assert 0 < starts[1] <= 700_000
    assert starts[1] < starts[2] <= 1_200_000
    assert server.sent("/set/000000.tar") < SIZE + 2 * 2 * cache_module.CHUNK


def test_attempts_count_only_in_a_row_without_progress(server, tmp_path):
    server.fail("/set/000000.tar", *[Fault(cut=300_000), Fault(status=500)] * 4)
    assert fetch(cache_of(server, tmp_path, attempts=3)).read_bytes() == CONTENTS[FIRST]


def test_errors_of_the_server_pass(server, tmp_path):
    server.fail("/set/000000.tar", Fault(status=500), Fault(status=503))
    assert fetch(cache_of(server, tmp_path)).read_bytes() == CONTENTS[FIRST]


def test_a_server_that_stays_broken_is_named_and_what_came_is_kept(server, tmp_path):
    cache = cache_of(server, tmp_path)
    server.fail("/set/000000.tar", Fault(cut=1_000_000), Fault(status=500), forever=True)
    with pytest.raises(Unavailable, match=r"/set/000000.tar: the server answered 500 \(3 attempts in a row, at byte"):
        fetch(cache)
    [partial] = partials(cache)
    kept = partial.stat().st_size
    assert kept > 0
    server.faults.clear()
    assert fetch(cache).read_bytes() == CONTENTS[FIRST]
    assert server.gets("/set/000000.tar")[-1].start == kept


def test_a_server_without_ranges_is_asked_for_the_whole_again(server, tmp_path):
    server.fail("/set/000000.tar", Fault(cut=700_000, whole=True), Fault(whole=True), Fault(whole=True))
    assert fetch(cache_of(server, tmp_path)).read_bytes() == CONTENTS[FIRST]
    assert len(server.gets("/set/000000.tar")) == 3


def test_a_server_without_ranges_that_always_breaks_is_given_up(server, tmp_path):
    server.fail("/set/000000.tar", Fault(cut=700_000, whole=True), forever=True)
    with pytest.raises(Unavailable, match="the body broke off"):
        fetch(cache_of(server, tmp_path))


@pytest.mark.parametrize("tags", [False, True])
def test_without_a_hash_a_body_is_continued_only_if_the_server_says_it_is_the_same(server, tmp_path, tags):
    server.tags = tags
    server.fail("/set/000000.tar", Fault(content=content_of(77), cut=700_000))
    assert cache_of(server, tmp_path).fetch(FIRST).read_bytes() == CONTENTS[FIRST]


def test_without_a_hash_a_tagged_body_is_continued(server, tmp_path):
    server.tags = True
    server.fail("/set/000000.tar", Fault(cut=700_000))
    assert cache_of(server, tmp_path).fetch(FIRST).read_bytes() == CONTENTS[FIRST]
    assert [r.start > 0 for r in server.gets("/set/000000.tar")] == [False, True]


def test_a_partial_of_other_content_is_started_over_once(server, tmp_path):
    server.fail("/set/000000.tar", Fault(content=content_of(77), cut=700_000))
    assert fetch(cache_of(server, tmp_path)).read_bytes() == CONTENTS[FIRST]
    assert [r.start > 0 for r in server.gets("/set/000000.tar")] == [False, True, False]


def test_content_that_differs_from_the_manifest_is_named_and_not_kept(server, tmp_path):
    cache = cache_of(server, tmp_path)
    other = content_of(77)
    server.fail("/set/000000.tar", Fault(cut=700_000), Fault(content=other), forever=True)
    with pytest.raises(
        Different,
        match=rf"/set/000000.tar: content differs from the manifest \(sha256 {hashlib.sha256(other).hexdigest()[:16]}, "
        rf"not {SHA256[FIRST][:16]}\); bring the file back, or write the manifest again",
    ):
        fetch(cache)
    assert [r.start > 0 for r in server.gets("/set/000000.tar")] == [False, True, False]
    assert not list(cache.directory.iterdir())


def test_content_wrong_in_one_piece_is_not_fetched_twice(server, tmp_path):
    server.files["/set/000000.tar"] = content_of(77)
    with pytest.raises(Different, match="content differs"):
        fetch(cache_of(server, tmp_path))
    assert len(server.gets("/set/000000.tar")) == 1


@pytest.mark.parametrize("lie", [-1000, 1000])
def test_a_length_that_differs_from_the_manifest_is_named(server, tmp_path, lie):
    server.fail("/set/000000.tar", Fault(lie=lie))
    with pytest.raises(Different, match=rf"its length of {SIZE + lie} bytes differs from the {SIZE} expected"):
        fetch(cache_of(server, tmp_path))


def test_final_faults_end_at_once(server, tmp_path):
    cache = cache_of(server, tmp_path)
    with pytest.raises(NotFound):
        cache.fetch("none.tar", size=1)
    server.fail("/set/000000.tar", Fault(status=403))
    with pytest.raises(DataError, match="access refused"):
        fetch(cache)
    assert len(server.gets("/set/000000.tar")) == len(server.gets("/set/none.tar")) == 1


def test_a_cache_travels_to_another_process(server, tmp_path):
    cache = cache_of(server, tmp_path)
    fetch(cache)
    assert pickle.loads(pickle.dumps(cache)) == cache


def _fetch_all(cache: ShardCache, names: list[str], start: object) -> int:
    """How many of the shards are as they should be."""
    start.wait(30)  # type: ignore[attr-defined]
    good = 0
    for name in names:
        with cache.open(name, size=SIZE, sha256=SHA256[name]) as file:
            good += hashlib.sha256(file.read()).hexdigest() == SHA256[name]
    return good


def _in_processes(cache: ShardCache, orders: list[list[str]]) -> list[int]:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(len(orders)) as pool:
        start = manager.Barrier(len(orders))
        waiting = [pool.apply_async(_fetch_all, (cache, order, start)) for order in orders]
        return [result.get(timeout=40) for result in waiting]


def test_processes_that_want_the_same_shards_download_each_once(server, tmp_path):
    cache = cache_of(server, tmp_path)
    for name in CONTENTS:
        server.fail(f"/set/{name}", Fault(pace=0.002))
    names = sorted(CONTENTS)
    assert _in_processes(cache, [names, names, names[::-1]]) == [8, 8, 8]
    assert [server.sent(f"/set/{name}") for name in names] == [SIZE] * 8
    assert [len(server.requests[f"/set/{name}"]) for name in names] == [1] * 8
    assert len(list(cache.directory.iterdir())) == 8


def test_processes_that_share_little_room_evict_each_other_and_still_read_right(server, tmp_path):
    cache = cache_of(server, tmp_path, limit=2 * SIZE + 1000, attempts=20)
    names, most, done = sorted(CONTENTS), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            with cache._holding(cache.directory / ".lock"):  # or one file would go, and another grow, while we add
                most[0] = max(most[0], _used(cache))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert _in_processes(cache, [names, names[::-1], names[3:] + names[:3]]) == [8, 8, 8]
    finally:
        done.set()
        watcher.join()
    assert 0 < most[0] <= cache.limit


def _used(cache: ShardCache) -> int:
    total = 0
    for path in cache.directory.glob("*"):
        if not path.name.endswith(".lock"):
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
    return total


KILLED = """
import sys
from pathlib import Path
from pipeline.data.cache import ShardCache
from pipeline.data.remote import Remote
root, directory, size, sha256 = sys.argv[1:]
ShardCache(Remote(root), Path(directory)).fetch("000000.tar", size=int(size), sha256=sha256)
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_or_interrupted_download_is_continued_by_the_next(server, tmp_path, sign):
    cache = cache_of(server, tmp_path, limit=SIZE)
    server.fail("/set/000000.tar", Fault(pace=0.05))
    command = [sys.executable, "-c", KILLED, cache.origin.root, str(cache.directory), str(SIZE), SHA256[FIRST]]
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
    locks = list(cache.directory.glob("*.lock"))
    assert len(locks) == (sign == signal.SIGKILL)
    assert fetch(cache).read_bytes() == CONTENTS[FIRST]
    assert server.gets("/set/000000.tar")[-1].start == kept
    assert len(list(cache.directory.iterdir())) == 1


def test_what_dead_processes_left_makes_room_for_others(server, tmp_path):
    cache = cache_of(server, tmp_path, limit=SIZE + 1000)
    cache.directory.mkdir()
    (cache.directory / f"{'0' * 16}.partial").write_bytes(bytes(SIZE))
    (cache.directory / f"{'0' * 16}.lock").write_text(str(SIZE))
    (cache.directory / f"{'1' * 16}.lock").write_text(str(SIZE))
    cache._named(FIRST, "lock").write_text("9" * 19)
    assert fetch(cache).read_bytes() == CONTENTS[FIRST]
    assert not partials(cache)


def test_whoever_takes_a_dead_lock_is_promised_nothing_yet(server, tmp_path):
    cache = cache_of(server, tmp_path)
    cache.directory.mkdir()
    lock = cache._named(FIRST, "lock")
    lock.write_text("9" * 19)
    assert cache_module._promised(lock) is None
    with cache._holding(lock):
        assert cache_module._promised(lock) == 0


def test_a_lock_has_one_holder_at_a_time_though_its_file_goes_with_each(server, tmp_path):
    cache, inside, most = cache_of(server, tmp_path), [0], [0]

    def hold() -> None:
        for _ in range(100):
            with cache._holding(cache.directory / ".lock"):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.0002)
                inside[0] -= 1

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert most == [1]
    assert not list(cache.directory.iterdir())


def test_the_least_recently_used_is_evicted_and_the_limit_kept(server, tmp_path):
    cache = cache_of(server, tmp_path, limit=3 * SIZE + 1000)
    a, b, c, d, e = sorted(CONTENTS)[:5]
    for name in (a, b, c, a):  # b is now the oldest
        fetch(cache, name)
    fetch(cache, d)
    assert held(cache) == {a, c, d}
    fetch(cache, c)
    fetch(cache, e)
    assert held(cache) == {c, d, e}
    assert _used(cache) <= cache.limit


def held(cache: ShardCache) -> set[str]:
    return {path.name[34:] for path in cache.directory.glob("*.tar")}


def test_room_is_made_before_the_download_and_nothing_foreign_is_touched(server, tmp_path):
    cache = cache_of(server, tmp_path, limit=SIZE)
    fetch(cache)
    foreign = cache.directory / "notes"
    foreign.write_bytes(bytes(SIZE))
    server.fail("/set/000001.tar", Fault(status=500), forever=True)
    with pytest.raises(Unavailable):
        fetch(cache, "000001.tar")
    assert not held(cache)
    assert foreign.exists()


def test_an_evicted_shard_stays_readable_where_it_is_open(server, tmp_path):
    cache = cache_of(server, tmp_path, limit=SIZE)
    with cache.open(FIRST, size=SIZE, sha256=SHA256[FIRST]) as file:
        path = fetch(cache)
        fetch(cache, "000001.tar")
        assert not path.exists()
        assert file.read() == CONTENTS[FIRST]


def test_a_shard_evicted_before_it_could_be_opened_is_fetched_again(server, tmp_path, monkeypatch):
    cache, fetched = cache_of(server, tmp_path), ShardCache.fetch

    def evicted_once(self: ShardCache, *args: object, **options: object) -> Path:
        path = fetched(self, *args, **options)  # type: ignore[arg-type]
        if len(server.gets("/set/000000.tar")) == 1:
            path.unlink()
        return path

    monkeypatch.setattr(ShardCache, "fetch", evicted_once)
    with cache.open(FIRST, size=SIZE, sha256=SHA256[FIRST]) as file:
        assert file.read() == CONTENTS[FIRST]


def test_a_shard_larger_than_the_limit_is_named(server, tmp_path):
    with pytest.raises(DataError, match=rf"its {SIZE} bytes exceed the cache's limit of 1000000; raise the limit"):
        fetch(cache_of(server, tmp_path, limit=1_000_000))


def test_a_full_disk_is_named_and_given_back_what_the_partial_took(server, tmp_path):
    cache = cache_of(server, tmp_path)
    limited = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))\n"
        "import errno, pipeline.data.cache as c; c.FULL += (errno.EFBIG,)\n"  # what such a limit answers for ENOSPC
    )
    command = [
        sys.executable,
        "-c",
        limited + KILLED,
        cache.origin.root,
        str(cache.directory),
        str(SIZE),
        SHA256[FIRST],
    ]
    said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stderr
    assert "free some space, set a limit for the cache, or give it another directory" in said
    assert not list(cache.directory.iterdir())


def test_a_directory_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match="give the cache a directory of its own"):
        fetch(cache_of(server, tmp_path))


def test_idle_fetching_leaves_alone_what_another_downloads_or_has(server, tmp_path):
    cache = cache_of(server, tmp_path)
    cache.directory.mkdir()
    with cache._named(FIRST, "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not cache.fetch_if_idle(FIRST, size=SIZE, sha256=SHA256[FIRST])
    assert not server.gets("/set/000000.tar")
    assert cache.fetch_if_idle(FIRST, size=SIZE, sha256=SHA256[FIRST])
    assert not cache.fetch_if_idle(FIRST, size=SIZE, sha256=SHA256[FIRST])
    assert len(server.gets("/set/000000.tar")) == 1


def test_idle_fetching_does_not_wait_for_room_that_is_promised(server, tmp_path):
    cache = cache_of(server, tmp_path, limit=SIZE)
    cache.directory.mkdir()
    with (cache.directory / f"{'0' * 16}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("1000")
        lock.flush()
        assert not cache.fetch_if_idle(FIRST, size=SIZE, sha256=SHA256[FIRST])
    assert cache.fetch_if_idle(FIRST, size=SIZE, sha256=SHA256[FIRST])


def test_idle_fetching_stops_when_asked_and_keeps_what_came(server, tmp_path):
    cache, stop = cache_of(server, tmp_path), threading.Event()
    server.fail("/set/000000.tar", Fault(cut=700_000), Fault(delay=20))
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(Stopped):
        cache.fetch_if_idle(FIRST, size=SIZE, sha256=SHA256[FIRST], stop=stop)
    assert partials(cache)[0].stat().st_size > 0
