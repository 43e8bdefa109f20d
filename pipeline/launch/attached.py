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


def attached(command: Sequence[str], came: list[int] | None = None) -> int:
    """Run it on this terminal; returns its code, 128 + N if signal N ended it. Raises CommandError if it is not here.

    A session of its own, so that Ctrl-C reaches it once, through us. came: gets the signals that we were sent.
    """
    early: list[int] = []  # before there is a process
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: object) -> None:
        if came is not None:
            came.append(number)
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        process = subprocess.Popen(list(command), stdin=subprocess.DEVNULL, start_new_session=True)
        for number in early:
            process.send_signal(number)
        code = process.wait()
    except FileNotFoundError:
        raise CommandError(f"{command[0]} is not found; launch where it is installed") from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code
