"""What time it is elsewhere: each rank answers with its clock, and whoever asks learns that it can be reached.

    apart = own time in the middle of an exchange - the answer, exact to half of what the exchange took

Of several exchanges the shortest counts: any wait on the way only adds to it (Cristian 1989).
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from typing import NamedTuple

_FORM = struct.Struct("!d")
_EXCHANGES = 8


class Apart(NamedTuple):
    """seconds that this clock is ahead of another, give or take error."""

    seconds: float
    error: float


class TimeServer:
    """Answers every byte with the time, until it is closed. port: where, on all addresses of this machine."""

    def __init__(self) -> None:
        self._socket = _listening()
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=_answer, args=(connection,), daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # which wakes the thread that accepts
        self._socket.close()


def clock_apart(host: str, port: int, seconds: float = 3.0) -> Apart:
    """This clock against that of another rank's server. Raises OSError where it cannot be reached."""
    best = Apart(0.0, float("inf"))
    with socket.create_connection((host, port), timeout=seconds) as asked:
        asked.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(_EXCHANGES):
            sent, began = time.time(), time.monotonic()
            asked.sendall(b"?")
            answer = b""
            while len(answer) < _FORM.size:
                piece = asked.recv(_FORM.size - len(answer))
                if not piece:
                    raise ConnectionResetError(None, "it hung up")
                answer += piece
            half = (time.monotonic() - began) / 2
            if half < best.error:
                best = Apart(sent + half - _FORM.unpack(answer)[0], half)
    return best


def _answer(connection: socket.socket) -> None:
    with contextlib.suppress(OSError), connection:
        connection.settimeout(60)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while connection.recv(1):
            connection.sendall(_FORM.pack(time.time()))


def _listening() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # a kernel may know IPv6 and have it turned off
            return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)
