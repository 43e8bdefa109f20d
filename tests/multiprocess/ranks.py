"""Real ranks for tests: processes with a gloo group, forked from a server that has imported torch already."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.multiprocess.preload"])


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any, seconds: float = 240) -> list[Any]:
    """function(rank, world, *arguments) on every rank of a gloo group; what each returned, in the order of ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = _SERVER.SimpleQueue()
    processes = [
        _SERVER.Process(target=_rank, args=(rank, world, port, queue, function, arguments)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in processes:
            deadline = time.monotonic() + seconds
            while not queue._reader.poll(0.2):
                left = set(range(world)) - set(results)
                assert time.monotonic() < deadline, f"ranks {left} gave no result"
                assert not any(processes[rank].exitcode for rank in left), f"of the ranks {left} one was killed"
            rank, result, failure = queue.get()
            assert failure is None, f"rank {rank} failed:\n{failure}"
            results[rank] = result
    finally:
        for process in processes:
            process.join(5 if len(results) == world else 0)
            if process.is_alive():
                process.kill()
                process.join()
    return [results[rank] for rank in range(world)]


def _rank(
    rank: int, world: int, port: int, queue: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        queue.put((rank, function(rank, world, *arguments), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))


def with_group(rank: int, world: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(rank, world, *arguments) inside an initialized gloo group."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        result = function(rank, world, *arguments)
        # Rank 0 holds the store by which groups meet: were it gone first, a group of others that is slower could not.
        dist.barrier()
        return result
    finally:
        dist.destroy_process_group()
