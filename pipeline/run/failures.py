"""What ends a run before its time, as the one line that it is."""

from __future__ import annotations

import errno
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.callbacks.preemption import SIGNALS, InterruptedRunError
from pipeline.callbacks.watchdog import Watchdog, connection_broke, note_traceback
from pipeline.config import Config
from pipeline.launch.failure import FailedRunError
from pipeline.launch.plan import worker_count
from pipeline.run.assembly import Assembly, accelerator_of, micro_batch_images
from pipeline.training.checkpoint import checkpoints
from pipeline.training.shortage import Appetite, shortage
from pipeline.world import World

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EPERM, errno.EACCES, errno.ESTALE, errno.EIO, errno.EFBIG)


@contextmanager
def explained(run: Assembly, watchdog: Watchdog) -> Iterator[None]:
    """Watch what runs inside, and say of its failures what they are. Raises FailedRunError for those it knows."""
    config, logs = run.config, run.config.directory / "logs"
    failed = False  # of itself, so that the others may not know
    try:
        yield
    except Exception as error:
        failed = True
        if type(error).__module__.startswith("pipeline"):  # it says itself what it is
            failed = not isinstance(error, InterruptedRunError | FailedRunError)
            raise
        who = f"rank {run.world.rank} of {run.world.size} on {socket.gethostname()}"
        unwritable = _unwritable(error, config)
        if unwritable:
            raise FailedRunError(f"{who}: {unwritable}") from None
        said = shortage(error, _appetite(config, run.world))
        if not said and not connection_broke(error):
            raise
        log = note_traceback(logs, run.world.rank, error)
        if said:
            raise FailedRunError(f"{who}: {said} (all of it in {log})") from None
        failed = False
        raise watchdog.lost(error) from None
    finally:
        watchdog.stop(failed=failed)


def _unwritable(error: Exception, config: Config) -> str:
    """What to say of a file of the run that cannot be written, or ""."""
    if not isinstance(error, OSError) or error.errno not in _UNWRITABLE:
        return ""
    directory = config.directory
    saved = checkpoints(directory / "checkpoints")
    last = f"{saved[-1].name} is the newest checkpoint" if saved else "there is no checkpoint yet"
    return (
        f"{error.filename or f'a file in {directory}'} cannot be written ({error.strerror}); {last}; make room, or the "
        f"directory writable, and go on with: {config.way_on}"
    )


def _appetite(config: Config, world: World) -> Appetite:
    return Appetite(
        images=-(-micro_batch_images(config, world.size) // world.size),
        image_size=config.data.image_size,
        width=config.model.width,
        precision=config.trainer.precision,
        workers=worker_count(config, cuda=accelerator_of(config) == "cuda"),
    )


class _SignalledError(BaseException):
    """A signal, on its way out of whatever runs: code that takes any Exception for a fault of its own lets it pass."""


@contextmanager
def interruptible() -> Iterator[None]:
    """End what runs inside by an InterruptedRunError when a signal comes that the training does not hear itself.

    That is before its first step and after its last: nothing is lost there that the next start does not do again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        for each in SIGNALS:  # a second one ends the process at once
            signal.signal(each, signal.SIG_DFL)
        raise _SignalledError

    previous = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    except _SignalledError:
        raise InterruptedRunError("interrupted") from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
