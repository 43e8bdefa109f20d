"""Processes that serve another one end when it does, however it ended."""

import multiprocessing
import os
import threading

PREFETCHED = 4  # micro-batches that a process which loads holds ready for its parent


def end_with_parent() -> None:
    """In a process that multiprocessing started: end at once when the process that asked for it is gone.

    Nothing else would do it after a SIGKILL. A data worker's parent by number is the fork server, which lives until
    the last of its workers has closed a pipe that all inherit; the processes of a pool hold each other's queue open.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end with parent", daemon=True).start()
