"""Tasks shared out over processes, their results in the order in which they end."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

from pipeline.data.parent import end_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")


def completed(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Generator[Result, None, None]:
    """function(task) of every task, in `workers` processes, or in this one for 1.

    To be closed: tasks that were begun then end, the others are given up.
    """
    if workers <= 1:
        yield from map(function, tasks)
        return
    # spawn: the caller may hold threads, which a fork would copy in the middle of their work.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        with _ignoring_interrupts():  # which the processes inherit: Ctrl-C lets them end their task
            futures = [pool.submit(function, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
