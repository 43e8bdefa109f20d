"""Commands of others (docker, sky): found, asked, or run until they end, with our signals handed on."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Sequence

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
_SECONDS = 60.0  # to answer


class CommandError(Exception):
    """Another's command is not here, or did not do what it was asked: the message names the way out."""


def first_of(*names: str) -> str:
    """The first of these commands that is here; "" for none."""
    return next((name for name in names if shutil.which(name)), "")


def asked(*command: str, seconds: float = _SECONDS) -> str:
    """What it prints. Raises CommandError."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except FileNotFoundError:
        raise CommandError(f"{command[0]} is not found; look where it is installed") from None
    except subprocess.TimeoutExpired:
        raise CommandError(f"{command[0]} has not answered for {seconds:.0f} s; try again later") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"code {done.returncode}"]
        raise CommandError(f"{command[0]}: {said[-1].strip()}; see what `{' '.join(command[:3])}` says")
    return done.stdout


def attached(command: Sequence[str]) -> int:
    """Run it on this terminal; returns its code, 128 + N if signal N ended it. Raises CommandError if it is not here.

    A session of its own, so that Ctrl-C reaches it once, through us.
    """
    try:
        process = subprocess.Popen(list(command), stdin=subprocess.DEVNULL, start_new_session=True)
    except FileNotFoundError:
        raise CommandError(f"{command[0]} is not found; launch where it is installed") from None
    previous = {n: signal.signal(n, lambda number, frame: process.send_signal(number)) for n in FORWARDED}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code
