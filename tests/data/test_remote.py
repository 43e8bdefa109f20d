from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.data.remote import NotFound, RangeIgnored, Remote, Stopped, Unavailable, check_location, is_remote, pause
from pipeline.data.shards import DataError
from tests.data.faulty_server import Fault, FaultyServer, faulty_server

pytestmark = pytest.mark.timeout(30)
CONTENT = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with faulty_server() as server:
        server.files = {"/set/a.tar": CONTENT, "/set/val/b.tar": b"b" * 1000, "/set/empty": b""}
        yield server


def remote_of(server: FaultyServer, **options: float) -> Remote:
    return Remote(f"{server.url}/set", **{"attempts": 3, "wait": 0.01, "timeout": 5.0, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("location", "remote"),
    [
        ("https://host/set", True), ("HTTP://host/set", True), ("s3://bucket/a b", True), ("gs://bucket", True),
        ("/data/set", False), ("data/v1:2/set", False), ("C:\\data\\set", False), ("C:/data", False), ("", False),
        ("https://host:8443/set/train-{000000..000999}.tar", True),
    ],
)  # fmt: skip
def test_a_url_is_remote_and_a_path_is_not(location, remote):
    check_location(location)
    assert is_remote(location) is remote


@pytest.mark.parametrize(
    "location",
    ["pipe:curl -H 'Token: hunter2' https://h/a", "xyz://hunter2@host/a", "file:///data", "file:data", "s3a://b/c"],
)
def test_an_unknown_scheme_is_refused_and_the_way_out_named(location):
    with pytest.raises(DataError, match=r"s3:// and gs:// are read; mount or copy") as caught:
        check_location(location)
    assert "hunter2" not in str(caught.value)
    assert not is_remote(location)


@pytest.mark.parametrize(
    "location",
    [
        "https://user:hunter2@host/set", "https://hunter2@host/set", "s3://key:hunter2@bucket/set",
        "https://user:hun/ter2@host/set", "https://user:hun?ter2@host/set", "https://user:hun#ter2@host/set",
        "https://host/a?X-Amz-Signature=hunter2", "https://host/a?token=hunter2", "https://host/a?sv=1&sig=hunter2",
        "https://[hunter2/a",
    ],
)  # fmt: skip
def test_credentials_in_a_url_are_refused_and_not_repeated(location):
    with pytest.raises(DataError) as caught:
        Remote(location)
    assert "ter2" not in str(caught.value)
    assert "hun" not in str(caught.value)


def test_a_query_or_a_missing_host_is_refused():
    with pytest.raises(DataError, match="https://host/a goes on with a query"):
        check_location("https://host/a?page=2")
    with pytest.raises(DataError, match="names no bucket"):
        check_location("s3:///prefix")
    with pytest.raises(DataError, match="is a path, not a URL"):
        Remote("/data/set")


@pytest.mark.parametrize("name", ["../a.tar", "x/../../a.tar", "/a.tar", "a//b.tar", "", ".", "a\nb.tar"])
def test_a_name_cannot_leave_the_root(name):
    with pytest.raises(DataError, match="must be a plain path below https://host/set"):
        Remote("https://host/set/").url(name)


def test_a_file_is_read_whole_and_from_a_byte_on(server):
    remote = remote_of(server)
    assert remote.size("a.tar") == len(CONTENT)
    assert remote.read("val/b.tar") == b"b" * 1000
    assert remote.read("empty") == b""
    assert b"".join(remote.stream("a.tar", 1000)) == CONTENT[1000:]
    assert server.sent("/set/a.tar", at_least=len(CONTENT) - 1000) == len(CONTENT) - 1000
    assert remote.read_if_there("a.tar") == CONTENT
    assert remote.read_if_there("c.tar") is None


def test_characters_of_a_name_are_encoded_and_not_interpreted(server):
    server.files["/set/a%20b%23%3F%2520.tar"] = b"odd"
    assert remote_of(server).read("a b#?%20.tar") == b"odd"


def test_faults_that_pass_are_tried_again(server):
    server.fail("/set/val/b.tar", Fault(status=500), Fault(cut=500), Fault(status=429), Fault(delay=1.0))
    assert remote_of(server, attempts=5, timeout=0.3).read("val/b.tar") == b"b" * 1000
    assert len(server.gets("/set/val/b.tar")) == 5


def test_faults_that_stay_are_named_after_as_many_attempts_as_asked(server):
    server.fail("/set/a.tar", Fault(status=503), forever=True)
    with pytest.raises(DataError, match=r"/set/a.tar: the server answered 503 \(3 attempts in all\); check the server"):
        remote_of(server).read("a.tar")
    assert len(server.gets("/set/a.tar")) == 3


@pytest.mark.parametrize(
    ("status", "words"), [(404, "not found"), (403, "access refused"), (401, "access refused"), (400, "answered 400")]
)
def test_a_final_fault_is_asked_for_once(server, status, words):
    server.fail("/set/a.tar", Fault(status=status), forever=True)
    with pytest.raises(DataError, match=rf"{server.url}/set/a.tar: .*{words}"):
        remote_of(server).read("a.tar")
    assert len(server.gets("/set/a.tar")) == 1


def test_a_missing_file_is_not_found(server):
    with pytest.raises(NotFound, match="bring the file back"):
        remote_of(server).size("c.tar")


def test_nobody_listening_is_named():
    with faulty_server() as gone:
        remote = remote_of(gone)
    with pytest.raises(DataError, match="connection refused"):
        remote.size("a.tar")


@pytest.mark.parametrize("tags", [False, True])
def test_a_body_that_breaks_off_is_never_hidden(server, tags):
    server.tags = tags  # with which obstore, left to itself, would continue
    server.fail("/set/a.tar", Fault(cut=700_000))
    with pytest.raises(Unavailable, match="the body broke off"):
        list(remote_of(server).stream("a.tar"))
    assert len(server.gets("/set/a.tar")) == 1


def test_a_body_shorter_than_announced_is_an_error(server):
    server.fail("/set/a.tar", Fault(lie=1000))
    with pytest.raises(Unavailable, match="the body broke off"):
        list(remote_of(server).stream("a.tar"))


def test_of_a_body_longer_than_announced_no_more_is_read(server):
    server.fail("/set/a.tar", Fault(lie=-1000))
    assert b"".join(remote_of(server).stream("a.tar")) == CONTENT[:-1000]


def test_a_silent_server_times_out(server):
    server.fail("/set/a.tar", Fault(delay=10), Fault(pace=10))
    for _ in range(2):
        with pytest.raises(Unavailable, match="timed out"):
            list(remote_of(server, timeout=0.2).stream("a.tar"))


def test_a_server_without_ranges_is_told_apart(server):
    server.fail("/set/a.tar", Fault(whole=True))
    with pytest.raises(RangeIgnored):
        remote_of(server).open("a.tar", 1000)


def test_waiting_ends_when_asked_to_stop(server):
    server.fail("/set/a.tar", Fault(delay=20))
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    began = time.monotonic()
    with pytest.raises(Stopped):
        remote_of(server, timeout=30.0).open("a.tar", stop=stop)
    assert time.monotonic() - began < 5


def test_an_interrupt_does_not_wait_for_a_silent_server(server):
    server.fail("/set/a.tar", Fault(delay=20))
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        remote_of(server, timeout=30.0).read("a.tar")
    assert time.monotonic() - began < 5


def test_http_has_no_listing(server):
    with pytest.raises(DataError, match=r"HTTP has no listing; give data.train and data.val as brace patterns"):
        remote_of(server).names()


def test_pauses_double_within_bounds_and_repeat():
    pauses = [pause("https://h/a", failures, 0.5) for failures in range(1, 12)]
    for failures, seconds in enumerate(pauses, 1):
        most = min(0.5 * 2 ** (failures - 1), 30.0)
        assert most / 2 <= seconds <= most
    assert pauses == [pause("https://h/a", failures, 0.5) for failures in range(1, 12)]
    assert pauses[0] != pause("https://h/b", 1, 0.5)


def test_a_remote_travels_to_another_process(server):
    remote = remote_of(server)
    remote.size("a.tar")  # a store is open in this process
    assert pickle.loads(pickle.dumps(remote)) == remote
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply_async(remote.size, ("a.tar",)).get(timeout=20) == len(CONTENT)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_is_told_instead_of_hanging(server, tmp_path):
    remote = remote_of(server)
    remote.size("a.tar")
    child = os.fork()
    if child == 0:
        try:
            remote.size("a.tar")
        except DataError as error:
            Path(tmp_path / "said").write_text(str(error))
        finally:
            os._exit(0)
    deadline = time.monotonic() + 10
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        time.sleep(0.02)
    assert "start workers by forkserver or spawn" in (tmp_path / "said").read_text()


@pytest.mark.parametrize("root", ["gs://bucket", "gs://bucket/a/prefix/"])
def test_a_google_store_opens_without_the_network(root, monkeypatch):
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    remote = Remote(root)
    assert remote.url("x/a.tar") == f"{root.rstrip('/')}/x/a.tar"
    store = remote._store()
    assert store.config["bucket"] == "bucket"
    assert str(store.prefix or "") == root.removeprefix("gs://bucket").strip("/")


def test_an_s3_store_is_listed_and_read(monkeypatch):
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    service = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    service.start()
    try:
        host, port = service.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="bucket")
        for name in ("train/a b%20.tar", "train/b.tar", "dataset.json"):
            client.put_object(Bucket="bucket", Key=f"set/{name}", Body=name.encode() * 100_000)
        remote = Remote("s3://bucket/set", attempts=2, wait=0.01, timeout=5.0)
        assert remote.names() == ["dataset.json", "train/a b%20.tar", "train/b.tar"]
        assert remote.names("train") == ["train/a b%20.tar", "train/b.tar"]
        assert remote.size("train/a b%20.tar") == 1_600_000
        assert b"".join(remote.stream("train/b.tar", 1000)) == (b"train/b.tar" * 100_000)[1000:]
        assert remote.read_if_there("dataset.json") is not None
        assert remote.read_if_there("c.tar") is None
        with pytest.raises(NotFound):
            remote.read("c.tar")
        with pytest.raises(NotFound):
            Remote("s3://other/set", attempts=2, wait=0.01).names()
    finally:
        service.stop()
