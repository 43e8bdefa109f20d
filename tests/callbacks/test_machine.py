"""What a machine does, by its own counters: real ones, and ones that were written by hand."""

import subprocess
import time
from pathlib import Path

import pytest

from pipeline.callbacks import machine
from pipeline.callbacks.machine import FIGURES, OF_A_GPU, Gpus, Machine
from pipeline.callbacks.metrics import OF_EACH_GPU, SYSTEM

NVML = r"""
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) { *h = (void *)(unsigned long)(i + 1); return LOST == i; }
int nvmlDeviceGetUtilizationRates(void *h, unsigned *r) { r[0] = h == (void *)1 ? 90 : 40; r[1] = 7; return 0; }
int nvmlDeviceGetMemoryInfo(void *h, unsigned long long *m) {
    m[0] = 80000000000; m[1] = 20000000000; m[2] = h == (void *)1 ? 60000000000 : 5000000000; return 0; }
int nvmlDeviceGetTemperature(void *h, int sensor, unsigned *t) { *t = 50 + sensor; return h == (void *)2 ? 3 : 0; }
int nvmlDeviceGetPowerUsage(void *h, unsigned *milliwatts) { *milliwatts = 345500; return 0; }
"""


def test_the_documented_figures_are_those_of_a_sample():
    assert tuple(metric.name for metric in SYSTEM) == FIGURES
    assert tuple(metric.name for metric in OF_EACH_GPU) == OF_A_GPU


def test_a_sample_of_this_machine_has_what_linux_counts(tmp_path):
    here = Machine(tmp_path)
    until = time.monotonic() + 0.5
    while time.monotonic() < until:  # one core is busy
        pass
    found = here.sample()
    assert set(found) <= set(here.names)
    assert 0 < found["cpu"] <= 1
    assert min(found["memory_used_gb"], found["disk_free_gb"]) > 0
    assert min(found["network_in_mb"], found["load"]) >= 0


def write_proc(root: Path, *, busy: int, idle: int, sectors: int, received: int) -> None:
    (root / "net").mkdir(parents=True, exist_ok=True)
    (root / "stat").write_text(f"cpu  {busy} 0 0 {idle} 0 0 0 0 5 0\ncpu0 1 2 3\n")
    (root / "meminfo").write_text("MemTotal:  4000000 kB\nMemFree: 1 kB\nMemAvailable:  1000000 kB\n")
    (root / "diskstats").write_text(
        f"8 0 sda 1 0 {sectors} 0 1 0 {2 * sectors} 0 0 0 0\n8 1 sda1 1 0 {sectors} 0 1 0 {sectors} 0 0 0 0\n"
    )
    (root / "net/dev").write_text(
        f"Inter-| Receive\n face |bytes\n    lo: {received} 0 0 0 0 0 0 0 {received} 0\n"
        f"  eth0:{received} 0 0 0 0 0 0 0 {3 * received} 0\n"
    )


def test_rates_are_what_counters_grew_by_and_a_partition_or_the_loopback_does_not_count(tmp_path, monkeypatch):
    proc, block, clock = tmp_path / "proc", tmp_path / "block", [100.0]
    (block / "sda" / "device").mkdir(parents=True)
    monkeypatch.setattr(machine, "_PROC", proc)
    monkeypatch.setattr(machine, "_BLOCK", block)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    write_proc(proc, busy=100, idle=100, sectors=0, received=0)
    here = Machine(tmp_path)
    write_proc(proc, busy=175, idle=125, sectors=100_000, received=8_000_000)
    clock[0] = 104.0
    found = here.sample()
    assert (found["cpu"], found["memory_used_gb"]) == (0.75, pytest.approx(3.072))
    assert (found["disk_read_mb"], found["disk_write_mb"]) == (12.8, 25.6)
    assert (found["network_in_mb"], found["network_out_mb"]) == (2.0, 6.0)
    write_proc(proc, busy=175, idle=125, sectors=5, received=8_000_000)  # a counter that began anew
    clock[0] = 105.0
    found = here.sample()
    assert found["network_in_mb"] == 0.0
    assert not {"cpu", "disk_read_mb", "disk_write_mb"} & set(found)


def test_a_system_that_counts_nothing_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_PROC", tmp_path / "none")
    assert set(Machine(tmp_path / "none", "none.so").sample()) == {"load"}


@pytest.mark.parametrize("lost", [2, 1])
def test_gpus_are_asked_of_the_library_that_comes_with_the_driver(tmp_path, lost):
    """A library of our own in its place, with its functions and their arguments as NVML documents them."""
    source, library = tmp_path / "nvml.c", tmp_path / "nvml.so"
    source.write_text(NVML.replace("LOST", str(lost)))
    built = subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=False, capture_output=True)
    if built.returncode:
        pytest.skip("no compiler here")
    found = Gpus(str(library))
    if lost < 2:  # one is off the bus: the other tells on, under its own number
        assert {name.partition("_")[0] for name in found.read()} == {"gpu0"}
        return
    assert found.read() == {
        "gpu0_use": 0.9, "gpu0_memory_used_gb": 60.0, "gpu0_celsius": 50, "gpu0_watts": 345.5,
        "gpu1_use": 0.4, "gpu1_memory_used_gb": 5.0, "gpu1_watts": 345.5,  # that one does not tell how hot it is
    }  # fmt: skip
    assert set(found.read()) < set(Machine(tmp_path, str(library)).names)
