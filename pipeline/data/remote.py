"""Shards behind a URL: reading from http(s), s3 and gs through obstore, and which faults may pass.

    ROOT/NAME    a file below a root: https://host/folder, s3://bucket/prefix, gs://bucket/prefix

Credentials come from the environment (AWS_*, GOOGLE_*), never from the URL, which ends up in logs and config files.
A fault that may pass (5xx, timeout, reset, short body) is Unavailable; all others are final DataErrors.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import queue
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError, NotSupportedError, PermissionDeniedError, UnauthenticatedError
from obstore.store import GCSStore, HTTPStore, S3Store

from pipeline.data.shards import DataError

T = TypeVar("T")
_LOG = logging.getLogger(__name__)

SCHEMES = ("http", "https", "s3", "gs")
ELSEWHERE = "http(s)://, s3:// and gs:// are read; mount or copy what lies in any other store"
ACCESS = {
    "http": "HTTP is read without credentials: make the file public, or use s3:// or gs:// with the environment's",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
}
SECRET = re.compile(r"sig|token|key|secret|credential|passw|auth|x-amz|x-goog", re.IGNORECASE)

CHUNK = 256 * 1024  # bytes; of a body that breaks, obstore withholds what does not fill a chunk, so not much larger
LONGEST_BODY = "1h"  # obstore's default of 30 s would cut every large shard; a cut one is continued where it ended
LONGEST_PAUSE = 30.0  # seconds between two attempts


class Unavailable(DataError):
    """A fault that may pass: worth another attempt."""


class Unreached(Unavailable):
    """Nobody answers at that host and port."""


class RangeIgnored(DataError):
    """The server sends whole bodies only: start over."""


class NotFound(DataError):
    """404."""


class Stopped(Exception):
    """Asked to stop before the end."""


def is_remote(location: str) -> bool:
    """Whether a location is a URL that is read here; a plain path, with a drive or without, is not."""
    return _scheme(location) in SCHEMES


def check_location(location: str) -> None:
    """Raise DataError for a location that is neither a path nor a URL without credentials that is read here.

    No message repeats a secret: what may hold one is left out.
    """
    scheme = _scheme(location)
    if not scheme:
        return
    if scheme not in SCHEMES:
        raise DataError(f"{scheme}: is not read, nor is any URL handed to a shell; {ELSEWHERE}")
    shown = f"{scheme}://..."
    try:
        parts = urlsplit(location)
        _ = parts.port  # which a password with a slash in it is not
    except ValueError:  # its text repeats what it met
        raise DataError(f"{shown} is not a URL (its host or port); {ELSEWHERE}") from None
    if "@" in parts.netloc or SECRET.search(parts.query):
        raise DataError(
            f"{shown} holds credentials, which would end up in logs; use the environment: {_access(scheme)}"
        )
    if "@" not in location:
        shown = re.split("[?#]", location, maxsplit=1)[0]
    if parts.query or parts.fragment:
        raise DataError(
            f"{shown} goes on with a query or fragment, and names of shards cannot follow one; leave it out"
        )
    if not parts.netloc:
        raise DataError(f"{shown} names no {'host' if scheme.startswith('http') else 'bucket'}; {ELSEWHERE}")


def pause(url: str, failures: int, wait: float) -> float:
    """Seconds before the next attempt: doubled with each failure, and not the same on all nodes at once."""
    # Keyed by what is fetched and where, so that a run repeats; nodes that failed together come back apart.
    key = hashlib.blake2b(f"{url} {platform.node()} {failures}".encode(), digest_size=8)
    jitter = int.from_bytes(key.digest(), "big") / 2**64
    return float(min(wait * 2.0 ** min(failures - 1, 16), LONGEST_PAUSE) * (0.5 + 0.5 * jitter))


def say_again(fault: Unavailable, failures: int, attempts: int, seconds: float) -> None:
    """Say why nothing comes, once it is no glitch any more: on stderr where no logging is set up."""
    if failures > 2:
        _LOG.warning("%s (%d of %d attempts); again in %.0f s", fault, failures, attempts, seconds)


@dataclass(frozen=True, slots=True)
class Body:
    """A file on its way. size: of the whole file in bytes; tag: of its version, "" if the server gives none."""

    size: int
    tag: str
    chunks: Generator[bytes, None, None]

    def close(self) -> None:
        self.chunks.close()


def below(root: str, name: str) -> str:
    """A name below a root. Raises DataError for one that leaves it."""
    if any(part in ("", ".", "..") for part in name.split("/")) or not name.isprintable():
        raise DataError(f"shard name = {name!r} must be a plain path below {root}; correct it in the manifest")
    return f"{root}/{name}"


@dataclass(frozen=True)
class Remote:
    """Files below a root. Holds no connection, so that it can be pickled; each process opens its own."""

    root: str
    attempts: int = 8  # tries of size, read and names
    contacts: int = 8  # of which so many may meet nobody: an unknown host, a port where none listens
    wait: float = 0.5  # seconds before the second of them, doubled with each
    timeout: float = 30.0  # seconds without a byte

    def __post_init__(self) -> None:
        check_location(self.root)
        if not is_remote(self.root):
            raise DataError(f"{self.root} is a path, not a URL; {ELSEWHERE}")
        object.__setattr__(self, "root", self.root.rstrip("/"))

    def url(self, name: str) -> str:
        """The URL of a file. Raises DataError for a name that leaves the root."""
        return below(self.root, name)

    def version(self, name: str) -> str:
        """Nothing: a server would have to be asked."""
        return ""

    def size(self, name: str, stop: threading.Event | None = None) -> int:
        """Bytes of a file, as the server announces them."""
        return self._retried(name, lambda: obstore.head(self._store(), name)["size"], stop)

    def read(self, name: str) -> bytes:
        """The whole of a small file: a manifest, an index."""
        return self._retried(name, lambda: bytes(obstore.get(self._store(), name).bytes()))

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Some bytes of a file. Raises RangeIgnored where the server sends whole files only."""
        return self._retried(name, lambda: bytes(obstore.get_range(self._store(), name, start=start, length=length)))

    def read_if_there(self, name: str) -> bytes | None:
        """The same, or None for a 404."""
        try:
            return self.read(name)
        except NotFound:
            return None

    @property
    def has_listing(self) -> bool:
        return _scheme(self.root) in ("s3", "gs")

    def names(self, prefix: str = "") -> list[str]:
        """All names below a folder, sorted. Raises DataError for http(s)."""
        if not self.has_listing:
            raise DataError(
                f"{self.root}: HTTP has no listing; give data.train and data.val as brace patterns of its shards"
            )

        def listed() -> list[str]:
            return [entry["path"] for page in obstore.list(self._store(), prefix.strip("/") or None) for entry in page]

        return sorted(self._retried(prefix.strip("/"), listed))

    def stream(self, name: str, start: int = 0) -> Iterator[bytes]:
        """Chunks of a file from a byte on, in one attempt. Raises Unavailable if they break off."""
        with closing(self.open(name, start)) as body:
            yield from body.chunks

    def open(self, name: str, start: int = 0, stop: threading.Event | None = None) -> Body:
        """One attempt at a file from byte `start` on; closed by its reader.

        Raises DataError: Unavailable if another attempt is worth it, RangeIgnored if only start = 0 is served.
        stop, once set, ends the waiting for each chunk with Stopped.
        """
        url = self.url(name)
        first: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        options: obstore.GetOptions = {"range": {"offset": start}} if start else {}

        def content() -> Iterator[bytes]:
            reply = obstore.get(self._store(), name, options=options)
            # What the announced length and the body's differ by, the client finds: a shorter body is an error, of a
            # longer one it reads no more than was announced.
            moment = reply.meta["last_modified"].timestamp()  # 0 if the server gives none
            tag = f"{reply.meta['e_tag'] or ''} {moment or ''}".strip()
            first.put((reply.meta["size"], tag))
            yield b""
            for chunk in reply.stream(min_chunk_size=CHUNK):
                yield bytes(chunk)

        def chunks() -> Generator[bytes, None, None]:
            try:
                yield from _apart(content, stop)
            except (BaseError, FileNotFoundError) as error:
                raise _fault(url, error) from None

        body = chunks()
        next(body)
        return Body(*first.get(), body)

    def _retried(self, name: str, ask: Callable[[], T], stop: threading.Event | None = None) -> T:
        url = self.url(name) if name else self.root
        failures = unreached = 0
        while True:
            try:
                return next(_apart(lambda: iter([ask()]), stop))
            except (BaseError, FileNotFoundError) as error:
                fault = _fault(url, error)
            failures += 1
            if not isinstance(fault, Unavailable):
                raise fault
            unreached += isinstance(fault, Unreached)
            if failures >= self.attempts or unreached >= self.contacts:
                raise DataError(f"{fault} ({failures} attempts in all); check the server and the network, then go on")
            seconds = pause(url, failures, self.wait)
            say_again(fault, failures, self.attempts, seconds)
            if stop is None:
                time.sleep(seconds)
            elif stop.wait(seconds):
                raise Stopped

    def _store(self) -> HTTPStore | S3Store | GCSStore:
        # obstore's threads are gone in a forked child, where its next call would wait for them for ever.
        if _first_user() != os.getpid():
            raise DataError(
                f"{self.root}: this process was forked from one that has read remote shards, and cannot read any; "
                "start workers by forkserver or spawn"
            )
        return _opened(self.root, self.timeout)


@functools.cache
def _first_user() -> int:
    return os.getpid()


@functools.cache
def _opened(root: str, timeout: float) -> HTTPStore | S3Store | GCSStore:
    scheme, rest = root.split("://", 1)
    bucket, _, prefix = rest.partition("/")
    # A store on the cluster's own network speaks http; whoever wrote http:// into the variable wants it.
    endpoints = [os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")]
    options: obstore.store.ClientConfig = {
        "connect_timeout": timedelta(seconds=min(timeout, 10.0)),
        "read_timeout": timedelta(seconds=timeout),  # obstore's default is none
        "timeout": LONGEST_BODY,
        "allow_http": scheme.lower() == "http" or any(e.startswith("http://") for e in endpoints),
    }
    # obstore would repeat failed requests 10 times by itself, and continue a broken body if, and only if, the server
    # gives an ETag. Both are done in one place instead, which counts, says what it does, and checks the whole.
    retry: obstore.store.RetryConfig = {"max_retries": 0, "retry_timeout": timedelta(minutes=1)}
    if scheme.lower() == "s3":
        return S3Store(bucket, prefix=prefix or None, client_options=options, retry_config=retry)
    if scheme.lower() == "gs":
        return GCSStore(bucket, prefix=prefix or None, client_options=options, retry_config=retry)
    return HTTPStore(root, client_options=options, retry_config=retry)


def _scheme(location: str) -> str:
    """Lower case; empty for a path. pipe: and file: need no slashes, and one letter is a drive."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://|(pipe|file):", location)
    return (found[1] or found[2]).lower() if found else ""


def _access(scheme: str) -> str:
    return ACCESS["http" if scheme == "https" else scheme]


def _fault(url: str, error: Exception) -> DataError:
    text = str(error)
    status = re.search(r"status code: (\d{3})", text)
    if isinstance(error, FileNotFoundError) or (status and status[1] == "404"):
        return NotFound(f"{url}: not found (404); check the name, or bring the file back")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return DataError(f"{url}: access refused; {_access(_scheme(url))}")
    if isinstance(error, NotSupportedError):
        return RangeIgnored(f"{url}: the server ignores ranges; serve the file from one that does not")
    if "MissingContentLength" in text:
        return DataError(f"{url}: the server announces no Content-Length; serve the file from one that does")
    if "invalid peer certificate" in text:
        return DataError(f"{url}: the server's certificate is not valid; correct it, or use the name it was made for")
    if "configured region" in text:
        return DataError(f"{url}: the bucket lies in another region; set AWS_REGION to it")
    if "169.254.169.254" in text or "metadata.google" in text:  # where obstore looks when the environment has none
        return Unavailable(f"{url}: no credentials were found; {_access(_scheme(url))}")
    if "ConnectError(" in text:
        return Unreached(f"{url}: {_reason(text)}")
    if status is None:
        return Unavailable(f"{url}: {_reason(text)}")
    if status[1] == "416":
        return RangeIgnored(f"{url}: shorter than what was already read of it")
    if status[1][0] == "5" or status[1] in ("408", "425", "429"):
        return Unavailable(f"{url}: the server answered {status[1]}")
    return DataError(f"{url}: the server answered {status[1]}; check the name and that it serves plain files")


def _reason(text: str) -> str:
    """A few words for what obstore tells in fifty lines, among them URLs with what they may hold."""
    for sign, words in (
        ("TimedOut", "timed out"),
        ("Timeout", "timed out"),
        ("dns error", "the host's name is not known"),
        ("ConnectionRefused", "connection refused"),
        ("Connect,", "no connection"),
        ("Interrupted", "the body broke off"),
        ("Body", "the body broke off"),
        ("ConnectionReset", "connection reset"),
        ("Request", "the connection broke off"),
    ):
        if sign in text:
            return words
    return re.sub(r"\S+://\S+", "...", text.split("\n", maxsplit=1)[0])


def _apart(items: Callable[[], Iterator[T]], stop: threading.Event | None) -> Iterator[T]:
    """The same items, made in a thread of their own, four ahead.

    While obstore waits for the network Python sees no signal: Ctrl-C would wait for a silent server's timeout. A
    queue can be interrupted. It also lets the network go on while a chunk is hashed and written.
    """
    ahead: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(4)
    left = threading.Event()

    def put(item: T | None, error: BaseException | None) -> bool:
        while not left.is_set():
            try:
                ahead.put((item, error), timeout=0.2)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items():
                if not put(item, None):
                    return
            put(None, StopIteration())
        except BaseException as error:  # handed to the reader, whatever it is
            put(None, error)

    threading.Thread(target=work, name="pipeline-remote", daemon=True).start()
    try:
        while True:
            if stop is not None and stop.is_set():
                raise Stopped
            try:
                item, error = ahead.get(timeout=0.1)
            except queue.Empty:
                continue
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]  # None only beside an error
    finally:
        left.set()
