"""One run a directory: a lock that survives crashes, and file systems over the network, where flock may not hold.

DIR/.lock names its holder: host, process and when that process began. The holder touches it every few
seconds. On the same host a holder that is gone is known at once; on another, and in another container, whose
processes are counted anew, by a lock that nobody touches.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

LOCK = ".lock"
TOUCHED_EVERY, STALE_AFTER = 5.0, 45.0  # seconds


class LockedError(Exception):
    """The directory belongs to a run that is going on: the message names its holder and the way out."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A process: began tells it from a later one with its number, in clock ticks since the machine started.

    space: in which its number means it. Containers on the host's network share its name, and each counts from 1.
    """

    host: str
    process: int
    began: int
    boot: str
    space: str = ""

    def is_gone(self) -> bool | None:
        """Whether it has ended; None for a process of another machine or container, of which nothing is known."""
        here = this_process()
        if self.host != here.host:
            return None
        if self.boot != here.boot:
            return True  # the machine was started anew since
        return None if self.space != here.space else _began(self.process) != self.began


def this_process() -> Holder:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return Holder(socket.gethostname(), os.getpid(), _began(os.getpid()), boot, _space())


def _space() -> str:
    """The number of the process namespace. It is given again only when the namespace is gone, its processes with it."""
    try:
        return str(Path("/proc/self/ns/pid").readlink()).strip("pid:[]")
    except OSError:
        return ""


@contextmanager
def locked(directory: Path, say: Callable[[str], None] = print, *, instead: str = "run.id") -> Iterator[None]:
    """Hold a run's directory, which is made if need be. instead: what to give another of, where it is held.

    Raises LockedError if another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK
    while not _taken(path):
        _clear_if_stale(path, say, instead)
    ended = threading.Event()
    thread = threading.Thread(target=_touch, args=(path, ended), name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if _holder(path) == this_process():
            with suppress(OSError):  # stale then, as after a crash
                path.unlink(missing_ok=True)


def _taken(path: Path) -> bool:
    # A link is made or it is not, on NFS as well, and the file under it is whole from the start.
    me = this_process()
    mine = path.with_name(f"{path.name}.{_word(me)}")
    mine.write_text(json.dumps(asdict(me)))
    try:
        _link(mine, path)
    except FileExistsError:
        return False
    finally:
        mine.unlink()
    return True


def _link(file: Path, path: Path) -> None:
    """A second name for a file. Raises FileExistsError where there is one."""
    try:
        os.link(file, path)
    except FileExistsError:
        raise
    except OSError:  # a mounted bucket has no links, each kind of it with an error of its own
        with path.open("x") as lock:  # whole a moment later: who reads it before takes it for one of another machine
            lock.write(file.read_text())


def _word(holder: Holder) -> str:
    """Of a file name that no other process uses."""
    return f"{holder.host}.{holder.space}.{holder.process}"


def _clear_if_stale(path: Path, say: Callable[[str], None], instead: str) -> None:
    """Remove a lock whose holder is gone, after waiting to see it if that takes waiting. Raises LockedError."""
    holder = _holder(path)
    if holder is None:
        return  # given back in this moment
    gone = holder.is_gone()
    if gone is None:
        gone = _untouched(path, holder, say)
    if not gone:
        raise LockedError(
            f"{path.parent} belongs to a run that is going on: process {holder.process} on {holder.host}; "
            f"wait for it or stop it, or give another {instead}"
        )
    # Of several that find it stale one renames it; the others find it gone, or a new one.
    aside = path.with_name(f"{path.name}.stale.{_word(this_process())}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if _holder(aside) != holder:  # someone was faster and holds it now: give it back
        _link(aside, path)
    aside.unlink()


def _untouched(path: Path, holder: Holder, say: Callable[[str], None]) -> bool:
    """Whether a lock of another machine stays as it is for STALE_AFTER seconds, by the file system's own clock."""
    said = False
    first, seen_at = _modified(path), time.monotonic()
    while time.monotonic() - seen_at < STALE_AFTER:
        if not said:
            say(f"{path} is held from {holder.host}; watching for {STALE_AFTER:.0f} s whether its run still lives")
            said = True
        time.sleep(min(1.0, STALE_AFTER / 10))
        if _modified(path) != first or _holder(path) != holder:
            return False
    return True


def _touch(path: Path, ended: threading.Event) -> None:
    while not ended.wait(TOUCHED_EVERY):
        try:
            os.utime(path)
        except OSError:
            continue  # a file system that is away for a while: the run goes on


def _modified(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _holder(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        return Holder("unknown", 0, 0, "")


def _began(process: int) -> int:
    """When a process of this machine began, in clock ticks; -1 if there is none."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return -1 if fields[0] == "Z" else int(fields[19])
    except (OSError, IndexError):
        return -1
