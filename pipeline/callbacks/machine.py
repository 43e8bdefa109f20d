"""What a machine is doing at a moment: processors, memory, disks, network, GPUs, as its kernel and driver count them.

/proc and the library that comes with NVIDIA's driver say all of it; a package for each would have to be pinned.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_SECTOR = 512  # bytes of /proc/diskstats, whatever the disk's own are
_PROC, _BLOCK, _NET = Path("/proc"), Path("/sys/block"), Path("/sys/class/net")
_NVML = "libnvidia-ml.so.1"

# Names and units: metrics.py, docs/metrics.md.
FIGURES = (
    "cpu",
    "load",
    "memory_used_gb",
    "disk_read_mb",
    "disk_write_mb",
    "disk_free_gb",
    "network_in_mb",
    "network_out_mb",
)
OF_A_GPU = ("use", "memory_used_gb", "celsius", "watts")
Figures = dict[str, float]


class Machine:
    """Samples of this machine; a container sees its host's cores and memory, whatever it may use of them.

    directory: on whose file system space may run out.
    """

    def __init__(self, directory: Path, nvml: str = _NVML):
        self.directory = directory
        self._gpus = Gpus(nvml)
        self.names = (*FIGURES, *(f"gpu{number}_{name}" for number in self._gpus.handles for name in OF_A_GPU))
        self._before = _counted()

    def sample(self) -> Figures:
        """By name, since the sample before; what is not counted here is left out."""
        before, self._before = self._before, _counted()
        grown = {name: now - before[name] for name, now in self._before.items() if name in before}
        seconds = max(grown.pop("at"), 1e-9)
        busy, ticks = grown.pop("busy", 0.0), grown.pop("ticks", 0.0)
        found = {"cpu": min(max(busy / ticks, 0.0), 1.0)} if ticks > 0 else {}
        # A counter that fell was reset: nothing is known then.
        found |= {name: bytes_ / 1e6 / seconds for name, bytes_ in grown.items() if bytes_ >= 0}
        for look in (_load, _memory, self._free):
            with suppress(OSError, ValueError, LookupError):
                found |= look()
        return found | self._gpus.read()

    def _free(self) -> Figures:
        room = os.statvfs(self.directory)
        return {"disk_free_gb": room.f_bavail * room.f_frsize / 1e9}


def _counted() -> Figures:
    """Counters that grow, by name; those that this system does not have are left out."""
    found = {"at": time.monotonic()}
    for count in (_processors, _disks, _network):
        with suppress(OSError, ValueError, IndexError):
            found |= count()
    return found


def _processors() -> Figures:
    """Ticks of all cores: user nice system idle iowait irq softirq steal."""
    ticks = [float(word) for word in (_PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]]
    return {"ticks": sum(ticks), "busy": sum(ticks) - ticks[3] - ticks[4]}


def _disks() -> Figures:
    """Bytes of whole disks: partitions, and what is layered over disks, would count twice."""
    lines = [line.split() for line in (_PROC / "diskstats").read_text().splitlines()]
    own = [words for words in lines if (_BLOCK / words[2] / "device").exists()]
    if not own:
        return {}
    read, written = (_SECTOR * sum(float(words[column]) for words in own) for column in (5, 9))
    return {"disk_read_mb": read, "disk_write_mb": written}


def _network() -> Figures:
    """Bytes over network cards, where this machine shows any, since what lies over them (bonds, bridges) would count
    them again; else over all interfaces but its own to itself. RDMA passes the kernel by, and these counters.
    """
    lines = [line.partition(":") for line in (_PROC / "net/dev").read_text().splitlines()[2:]]
    every = {name.strip(): words.split() for name, _, words in lines if name.strip() != "lo"}
    counters = [words for name, words in every.items() if (_NET / name / "device").exists()] or list(every.values())
    came, went = (sum(float(words[column]) for words in counters) for column in (0, 8))
    return {"network_in_mb": came, "network_out_mb": went}


def _load() -> Figures:
    return {"load": os.getloadavg()[0]}


def _memory() -> Figures:
    lines = (line.split() for line in (_PROC / "meminfo").read_text().splitlines())
    kilobytes = {words[0]: float(words[1]) for words in lines}
    return {"memory_used_gb": (kilobytes["MemTotal:"] - kilobytes["MemAvailable:"]) * 1024 / 1e9}


class Gpus:
    """All GPUs that NVIDIA's driver shows on this node; none where there is no driver. Asking starts no work there."""

    def __init__(self, library: str = _NVML):
        self.handles: dict[int, ctypes.c_void_p] = {}  # by number; one that is lost, or not ours, leaves its number out
        with suppress(OSError, AttributeError):  # no driver, or one without these functions
            self._nvml = ctypes.CDLL(library)
            count = ctypes.c_uint()
            if self._nvml.nvmlInit_v2() or self._nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
                return
            for number in range(count.value):
                handle = ctypes.c_void_p()
                if not self._nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(number), ctypes.byref(handle)):
                    self.handles[number] = handle

    def read(self) -> Figures:
        """gpu<g>_use, share of time in which a kernel ran, and so on; what a GPU does not tell is left out."""
        return {f"gpu{number}_{name}": value for number, handle in self.handles.items()
                for name, value in self._read(handle).items()}  # fmt: skip

    def _read(self, handle: ctypes.c_void_p) -> Figures:
        rates, room, number = _Rates(), _Memory(), ctypes.c_uint()
        found: Figures = {}

        def ask(name: str, call: str, *arguments: object, value: Callable[[], float]) -> None:
            with suppress(AttributeError):
                if not getattr(self._nvml, call)(handle, *arguments):
                    found[name] = value()

        ask("use", "nvmlDeviceGetUtilizationRates", ctypes.byref(rates), value=lambda: rates.gpu / 100)
        ask("memory_used_gb", "nvmlDeviceGetMemoryInfo", ctypes.byref(room), value=lambda: room.used / 1e9)
        ask("celsius", "nvmlDeviceGetTemperature", ctypes.c_int(0), ctypes.byref(number), value=lambda: number.value)
        ask("watts", "nvmlDeviceGetPowerUsage", ctypes.byref(number), value=lambda: number.value / 1e3)
        return found


class _Rates(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))
