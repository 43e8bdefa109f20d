"""This machine: memory, shared memory, files, processors, GPUs and clock."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from pipeline.data.parent import PREFETCHED
from pipeline.doctor.findings import Finding, counted, fault, ok, warning

PROCESS_BYTES = 500_000_000  # of its own that a rank has once it has imported everything: 476 MB measured
WORKER_BYTES = 50_000_000  # a worker is forked from a process that has: 4 MB of its own, and its images
_BEGINNING = 1_767_225_600.0  # of 2026: no clock that is right is before this code


def check_devices(accelerator: str, devices: int, gpus: int, built: bool, elsewhere: bool) -> Iterator[Finding]:
    """GPUs against processes of a node. built: torch can use CUDA. elsewhere: the run's nodes are other machines."""
    if accelerator == "cpu":
        yield ok("devices", f"cluster.accelerator = cpu, {devices} {'process' if devices == 1 else 'processes'} a node")
    elif accelerator == "cuda" and gpus == 0:
        why = "torch finds none" if built else "torch is installed without CUDA"
        make = warning if elsewhere else fault
        yield make("devices", f"cluster.accelerator = cuda with cluster.devices = {devices}, and {why} on this machine",
                   "go on if its nodes have them" if elsewhere
                   else "see `nvidia-smi`, or set cluster.accelerator=cpu")  # fmt: skip
    elif gpus and devices > gpus:
        make = warning if elsewhere or accelerator == "auto" else fault
        yield make("devices", f"cluster.devices = {devices}, and this machine has {gpus} GPUs: ranks would share one, "
                   "which NCCL refuses and gloo does slowly", f"cluster.devices={gpus}")  # fmt: skip
    elif gpus:
        yield ok("devices", f"{devices} of {gpus} GPUs")
    elif Path("/proc/driver/nvidia/version").exists():
        yield warning("devices", "an NVIDIA driver is here, and torch finds no GPU: the run would be on the CPU",
                      "see `nvidia-smi` and torch.version.cuda")  # fmt: skip
    else:
        yield ok("devices", f"no GPU: {devices} {'process' if devices == 1 else 'processes'} on the CPU")


def check_shared_memory(ranks: int, workers: int, batch_bytes: int, gpus: int, place: str = "/dev/shm"  # noqa: S108
                        ) -> Iterator[Finding]:  # fmt: skip
    """Room for what loading processes hand over, and for NCCL. batch_bytes: of a rank's micro-batch."""
    needed = ranks * workers * PREFETCHED * batch_bytes + (100_000_000 * ranks if gpus > 1 and ranks > 1 else 0)
    try:
        status = os.statvfs(place)
    except OSError as error:
        if needed:
            yield fault("shared memory", f"{place}: {error.strerror}, and {workers} workers a rank need it",
                        "mount it, or set cluster.workers=0")  # fmt: skip
        return
    size = status.f_blocks * status.f_frsize
    use = f"{ranks} x {workers} workers use up to {_bytes(needed)}" if workers else "no workers need it"
    text = f"{place} has {_bytes(size)}, {use}"
    if size < needed:
        yield fault("shared memory", text,
                    "docker run --ipc=host or --shm-size=8g, or lower cluster.workers")  # fmt: skip
    elif size < 100_000_000:
        yield warning("shared memory", f"{text}: a container's default, too little for more workers or NCCL",
                      "docker run --ipc=host or --shm-size=8g")  # fmt: skip
    else:
        yield ok("shared memory", text)


def check_open_files(limit: int, shards: int, workers: int) -> Iterator[Finding]:
    """Files that a process may open. shards: that a reader keeps open."""
    needed = shards + 16 * workers + 128
    if 0 <= limit < needed:
        yield fault("open files", f"a process may open {limit}, one of this run needs about {needed}",
                    f"ulimit -n {max(4096, 2 * needed)}, or a smaller data.window")  # fmt: skip
    else:
        yield ok("open files", f"{limit if limit >= 0 else 'any number'} may be open, about {needed} are needed")


def check_memory(available: int, ranks: int, workers: int) -> Iterator[Finding]:
    """Memory for the processes alone: what model and images take comes on top."""
    needed = ranks * (PROCESS_BYTES + workers * WORKER_BYTES)
    text = f"{_bytes(available)} available; {ranks} x (1 + {workers}) processes begin with about {_bytes(needed)}"
    if available < needed:
        yield fault("memory", text, "lower cluster.devices or cluster.workers, or free memory")
    elif available < 2 * needed:
        yield warning("memory", f"{text}, before model and images", "lower cluster.workers if it runs out")
    else:
        yield ok("memory", text)


def check_processors(cores: float, ranks: int, threads: int, workers: int, cuda: bool) -> Iterator[Finding]:
    """Cores against what computes at once. cuda: the threads of a rank then wait for a GPU."""
    busy = ranks * ((1 if cuda else threads) + workers)
    text = f"{cores:g} cores; {counted(ranks, 'rank')} x ({counted(threads, 'thread')} + {counted(workers, 'worker')})"
    if busy > cores:
        yield warning("processors", f"{text}: more than there are", "lower cluster.workers, trainer.threads or "
                      "cluster.devices")  # fmt: skip
    else:
        yield ok("processors", text)


def check_clock(now: float, written: float) -> Iterator[Finding]:
    """The clock against this code's age, and the run's file system, by which a file of now was made at `written`."""
    if now < _BEGINNING:
        yield fault("clock", f"it says {time.strftime('%Y-%m-%d', time.gmtime(now))}: no server's certificate is valid",
                    "set it (NTP)")  # fmt: skip
    elif abs(now - written) > 30:
        yield warning("clock", f"it differs by {abs(now - written):.0f} s from that of the run's file system",
                      "set both (NTP): times in logs and checkpoints would not agree")  # fmt: skip
    else:
        yield ok("clock", f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime(now))} UTC, as the run's file system has it")


def check_temporary(environment: Mapping[str, str], find: Callable[[], str] = tempfile.gettempdir) -> Iterator[Finding]:
    """A real file where temporary ones go."""
    wanted = environment.get("TMPDIR", "")
    try:
        place = wanted or find()
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(1024))
        free = os.statvfs(place)
    except OSError as error:
        yield fault("temporary files", f"{f'TMPDIR = {wanted}' if wanted else 'no place for them'}: {error.strerror}",
                    "set TMPDIR to a directory that can be written")  # fmt: skip
        return
    room = free.f_bavail * free.f_frsize
    if room < 100_000_000:
        yield warning("temporary files", f"{place} has {_bytes(room)} free", "make room, or set TMPDIR")
    else:
        yield ok("temporary files", f"{place} can be written, {_bytes(room)} free")


def available_cores() -> float:
    """Cores that this process may use: by its affinity, and by the quota of its control group."""
    cores: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    return cores


def available_memory() -> int:
    """Bytes that new processes can have: of the machine, and within the limit of the control group."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    with suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return free


def _bytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def open_files() -> int:
    """Files that a process may open; -1 = any number."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return -1 if soft == resource.RLIM_INFINITY else soft


def existing(directory: Path) -> Path:
    """The directory, or the nearest one above it that exists, in which it would be made."""
    directory = directory.absolute()
    return next(place for place in (directory, *directory.parents) if place.exists())
