"""A file whose age tells from outside whether the training on this node goes on: for health checks of containers.

    python -m pipeline.launch.heartbeat [SECONDS]    # exit code 0 = healthy, 1 = it has not been renewed for so long

The first rank of a node renews it each second from the thread of its watchdog, as long as it stands nowhere for longer
than that allows: a validation or a checkpoint may last, a process that is stopped or starved renews nothing. Nothing of
it is in a step. Where there is no file nothing trains: not yet, not any more, or by another verb.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

HEARTBEAT = "PIPELINE_HEARTBEAT"  # the file; without it none is written
MAX_AGE = 60.0  # seconds


class Heartbeat:
    """The file of this process. A file that cannot be written is none: the training does not depend on it."""

    def __init__(self, path: Path):
        self.path = path

    def renew(self) -> None:
        with suppress(OSError):
            # Its place may be a /tmp of all: no link of somebody else's is followed.
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                os.utime(file)
            finally:
                os.close(file)

    def end(self) -> None:
        """Nothing trains any more."""
        with suppress(OSError):
            self.path.unlink()


def heartbeat_path(local_rank: int) -> Path | None:
    """Where this rank renews its heartbeat; None for all but the first of a node, and where nobody asks for it."""
    place = os.environ.get(HEARTBEAT)
    return Path(place) if place and local_rank == 0 else None


def age(path: Path) -> float | None:
    """Seconds since it was renewed; None where there is none. A clock that was set back counts as now."""
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def main(arguments: list[str]) -> int:
    path = os.environ.get(HEARTBEAT)
    try:
        allowed = float(arguments[0]) if arguments else MAX_AGE
    except ValueError:
        print(f"heartbeat: {arguments[0]} is no number of seconds", file=sys.stderr)
        return 2
    seconds = age(Path(path)) if path else None
    if seconds is None:
        print("nothing trains here")
        return 0
    print(f"the training gave a sign of life {seconds:.0f} s ago")
    return 0 if seconds <= allowed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
