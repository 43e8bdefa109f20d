"""An HTTP server on the loopback that fails as told, and counts what it was asked for and what it sent."""

from __future__ import annotations

import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PIECE = 64 * 1024


@dataclass(frozen=True)
class Fault:
    """What happens to one GET. The default is none."""

    status: int = 0  # answer this instead
    delay: float = 0.0  # seconds before the first byte
    pace: float = 0.0  # seconds before each piece of the body
    cut: int | None = None  # close the connection after so many bytes of the body
    lie: int = 0  # announce so many bytes more
    content: bytes | None = None  # send this instead
    whole: bool = False  # ignore the range


@dataclass
class Request:
    method: str
    start: int
    status: int
    sent: int = 0


@dataclass
class FaultyServer:
    """files: path -> content. faults: path -> one for each GET in turn, the last of which stays if `lasting`."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    lasting: set[str] = field(default_factory=set)
    tags: bool = False  # send an ETag
    requests: dict[str, list[Request]] = field(default_factory=lambda: defaultdict(list))
    over: threading.Event = field(default_factory=threading.Event)
    guard: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, path: str, *faults: Fault, forever: bool = False) -> None:
        self.faults[path] = list(faults)
        if forever:
            self.lasting.add(path)

    def gets(self, path: str) -> list[Request]:
        return [r for r in self.requests[path] if r.method == "GET"]

    def sent(self, path: str, *, at_least: int = 0) -> int:
        """Bytes of a body. at_least: wait for so many, since a client may have read what is not yet counted here."""
        end = time.monotonic() + 5.0
        while (count := sum(request.sent for request in self.gets(path))) < at_least and time.monotonic() < end:
            time.sleep(0.01)
        return count

    def next_fault(self, path: str) -> Fault:
        with self.guard:
            faults = self.faults.get(path, [])
            if not faults:
                return Fault()
            return faults[0] if len(faults) == 1 and path in self.lasting else faults.pop(0)


def _handler(server: FaultyServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 20
        disable_nagle_algorithm = True  # headers and body are written apart: each reply would wait 40 ms

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(Fault())

        def do_GET(self) -> None:
            self._answer(server.next_fault(self.path))

        def _answer(self, fault: Fault) -> None:
            span = self.headers.get("Range")
            start, stop = 0, None
            if span is not None and not fault.whole:
                first, last = span.removeprefix("bytes=").split("-")
                start, stop = int(first), int(last) + 1 if last else None
            request = Request(self.command, start, fault.status)
            server.requests[self.path].append(request)
            server.over.wait(fault.delay)
            content = fault.content if fault.content is not None else server.files.get(self.path)
            if fault.status == 0:
                request.status = 404 if content is None else 416 if start and start >= len(content) else 200
            if content is None or request.status != 200:
                self.send_response(request.status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = content[start:stop]
            if span is not None and not fault.whole:
                request.status = 206
            self.send_response(request.status)
            if request.status == 206:
                self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(body) + fault.lie))
            if server.tags:
                self.send_header("ETag", f'"{hash(content)}"')
            self.end_headers()
            if self.command == "GET":
                with suppress(ConnectionError):  # the client went
                    self._send(request, body, fault)

        def _send(self, request: Request, body: bytes, fault: Fault) -> None:
            end = len(body) if fault.cut is None else fault.cut
            for first in range(0, end, PIECE):
                if server.over.wait(fault.pace):
                    break
                piece = body[first : min(first + PIECE, end)]
                self.wfile.write(piece)
                request.sent += len(piece)
            if fault.cut is not None or fault.lie > 0 or server.over.is_set():
                self.close_connection = True
                with suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)

    return Handler


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: object) -> None:  # a client that was killed
        pass


@contextmanager
def faulty_server() -> Iterator[FaultyServer]:
    listener = _Listener(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server = FaultyServer(f"http://127.0.0.1:{listener.server_address[1]}")
    listener.RequestHandlerClass = _handler(server)
    thread = threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        listener.shutdown()
        listener.server_close()
        thread.join(timeout=5)
