"""Shards come before they are needed, in order, within the room there is; and whoever prefetches is soon gone."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from pipeline.data.prefetch import Prefetch
from tests.data.faulty_server import Fault, FaultyServer, faulty_server
from tests.data.test_cache import CONTENTS, FIRST, SHA256, SIZE, cache_of, fetch, held, partials, until

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with faulty_server() as server:
        server.files = {f"/set/{name}": content for name, content in CONTENTS.items()}
        yield server


def shards_of(names: list[str]) -> Iterator[tuple[str, int, str]]:
    return ((name, SIZE, SHA256[name]) for name in names)


def test_prefetching_keeps_as_many_shards_ahead_as_asked(server, tmp_path):
    cache, names = cache_of(server, tmp_path), sorted(CONTENTS)
    with Prefetch(cache, shards_of(names), ahead=2) as prefetch:
        until(lambda: held(cache) == set(names[:3]))
        time.sleep(0.1)
        assert held(cache) == set(names[:3])
        prefetch.advance(1)
        until(lambda: held(cache) == set(names[:4]))
        prefetch.advance(6)  # 4 and 5 are not needed any more
        until(lambda: held(cache) == {*names[:4], *names[6:]})
    assert not prefetch._thread.is_alive()
    assert not prefetch.errors


def test_prefetching_takes_the_room_and_evicts_nothing_that_is_still_to_be_read(server, tmp_path):
    cache, names = cache_of(server, tmp_path, limit=3 * SIZE), sorted(CONTENTS)
    fetch(cache, names[7])  # of another consumer
    with Prefetch(cache, shards_of(names[:7]), ahead=6) as prefetch:
        until(lambda: held(cache) == set(names[:3]))
        time.sleep(0.1)
        assert held(cache) == set(names[:3])
        fetch(cache, names[0])  # read late, and so the last one used
        prefetch.advance(1)
        until(lambda: held(cache) == set(names[1:4]))


def test_prefetchers_of_two_ranks_share_the_work(server, tmp_path):
    cache, names = cache_of(server, tmp_path), sorted(CONTENTS)
    for name in names:
        server.fail(f"/set/{name}", Fault(pace=0.002))
    with Prefetch(cache, shards_of(names), ahead=8), Prefetch(cache, shards_of(names), ahead=8):
        until(lambda: held(cache) == set(names))
    assert [server.sent(f"/set/{name}") for name in names] == [SIZE] * 8


def test_a_shard_that_fails_is_kept_as_an_error_and_the_next_is_fetched(server, tmp_path):
    cache = cache_of(server, tmp_path)
    server.fail("/set/000000.tar", Fault(status=403))
    with Prefetch(cache, shards_of([FIRST, "000001.tar"]), ahead=3) as prefetch:
        until(lambda: held(cache) == {"000001.tar"})
    assert "access refused" in str(prefetch.errors[0])
    assert fetch(cache).read_bytes() == CONTENTS[FIRST]


def test_an_order_that_fails_is_kept_as_an_error(server, tmp_path):
    def order() -> Iterator[tuple[str, int, str]]:
        yield FIRST, SIZE, SHA256[FIRST]
        raise ValueError("no more")

    with Prefetch(cache_of(server, tmp_path), order(), ahead=3) as prefetch:
        until(lambda: not prefetch._thread.is_alive())
    assert [str(error) for error in prefetch.errors] == ["no more"]


def test_prefetching_stops_promptly_in_the_middle_of_a_shard(server, tmp_path):
    cache = cache_of(server, tmp_path)
    server.fail("/set/000000.tar", Fault(cut=700_000), Fault(delay=20))
    prefetch = Prefetch(cache, shards_of([FIRST]), ahead=1)
    until(lambda: len(server.gets("/set/000000.tar")) == 2)
    began = time.monotonic()
    prefetch.close()
    assert time.monotonic() - began < 2
    assert not prefetch._thread.is_alive()
    assert partials(cache)
    assert not list(cache.directory.glob("*.lock"))


def test_a_copy_of_a_prefetch_in_another_process_rests(server, tmp_path):
    with Prefetch(cache_of(server, tmp_path), shards_of([FIRST]), ahead=1) as prefetch:
        until(lambda: len(server.gets("/set/000000.tar")) == 1)
        copy = pickle.loads(pickle.dumps(prefetch))
        until(lambda: not copy._thread.is_alive())
        copy.advance(3)
        copy.close()
        assert list(copy.errors) == []
    assert len(server.gets("/set/000000.tar")) == 1  # the copy asked for nothing


def test_prefetching_does_not_keep_the_interpreter_from_exiting(server, tmp_path):
    server.fail("/set/000000.tar", Fault(delay=20))
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom pipeline.data.cache import ShardCache\n"
        "from pipeline.data.prefetch import Prefetch\n"
        "from pipeline.data.remote import Remote\n"
        "prefetch = Prefetch(ShardCache(Remote(sys.argv[1]), Path(sys.argv[2])), [('000000.tar', 10, '')], ahead=1)\n"
        "time.sleep(0.3)\n"
    )
    command = [sys.executable, "-c", code, f"{server.url}/set", str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert server.gets("/set/000000.tar")
