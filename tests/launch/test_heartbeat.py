"""The age of one file tells from outside whether a training goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pipeline.launch.heartbeat import HEARTBEAT, Heartbeat, age, heartbeat_path


def checked(path, *arguments):
    """Exit code and line of the health check, as a container runs it."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.launch.heartbeat", *arguments],
        env={**os.environ, HEARTBEAT: str(path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout.strip() + done.stderr.strip()


def test_a_heartbeat_is_healthy_until_it_is_too_old(tmp_path):
    path = tmp_path / "beat"
    Heartbeat(path).renew()
    assert checked(path) == (0, "the training gave a sign of life 0 s ago")
    os.utime(path, (time.time() - 59.0,) * 2)
    assert checked(path)[0] == 0
    os.utime(path, (time.time() - 100.0,) * 2)
    assert checked(path) == (1, "the training gave a sign of life 100 s ago")
    assert checked(path, "200")[0] == 0
    assert checked(path, "soon") == (2, "heartbeat: soon is no number of seconds")


def test_where_nothing_trains_nothing_is_unhealthy(tmp_path):
    path = tmp_path / "beat"
    assert checked(path) == (0, "nothing trains here")
    beat = Heartbeat(path)
    beat.renew()
    beat.end()
    assert checked(path) == (0, "nothing trains here")
    beat.end()  # twice is no fault
    assert age(path) is None


def test_a_clock_set_back_is_no_fault(tmp_path):
    path = tmp_path / "beat"
    Heartbeat(path).renew()
    os.utime(path, (time.time() + 3600,) * 2)
    assert age(path) == 0.0


def test_a_file_that_cannot_be_written_stops_nothing_and_links_are_not_followed(tmp_path):
    Heartbeat(tmp_path / "absent" / "beat").renew()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    Heartbeat(tmp_path / "link").renew()
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("local_rank", "place", "expected"), [(0, "/x/beat", "/x/beat"), (1, "/x/beat", None), (0, "", None)]
)
def test_the_first_rank_of_a_node_has_a_heartbeat_where_one_is_asked_for(monkeypatch, local_rank, place, expected):
    monkeypatch.setenv(HEARTBEAT, place)
    found = heartbeat_path(local_rank)
    assert (str(found) if found else None) == expected


def test_the_check_loads_nothing_heavy():
    code = "import json, sys, pipeline.launch.heartbeat; print(json.dumps([n.split('.')[0] for n in sys.modules]))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "lightning", "hydra", "numpy", "wandb"} & set(json.loads(loaded))


WATCHED = """
import sys, time
from pathlib import Path
import torch, lightning
from pipeline.callbacks import watchdog
from pipeline.launch.heartbeat import Heartbeat
from pipeline.launch.pulse import Pulse
watchdog.TICK = 0.05
hang, phase = float(sys.argv[2]), sys.argv[3]
w = watchdog.Watchdog(Pulse(), rank=0, world=1, host="here", hang_seconds=hang, first_seconds=hang,
                      logs=Path(sys.argv[1]), name=lambda *a: [], heartbeat=Heartbeat(Path(sys.argv[1]) / "beat"))
w.setup(None, torch.nn.Linear(1, 1), "fit")
print("begun", flush=True)
until = time.monotonic() + (120 if phase == "moves" else 0)
while time.monotonic() < until:
    w.pulse.move("forward")
    time.sleep(0.02)
if phase == "ends":
    w.stop()
    print("ended", flush=True)
time.sleep(60)
"""


@pytest.fixture
def watched(tmp_path):
    """Starts a process with a watchdog that looks every 0.05 s; ends them all."""
    processes = []

    def start(hang: float, phase: str):
        process = subprocess.Popen([sys.executable, "-c", WATCHED, str(tmp_path), str(hang), phase],
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def oldest(path, seconds):
    """The greatest age seen within so many seconds."""
    until, found = time.monotonic() + seconds, 0.0
    while time.monotonic() < until:
        found = max(found, age(path) or 0.0)
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("hang", [30.0, 0.0])  # 0: nobody watches for hangs, and a frozen process is seen all the same
def test_a_training_that_is_frozen_stops_its_heartbeat_and_goes_on_when_it_thaws(tmp_path, watched, hang):
    process, path = watched(hang, "moves"), tmp_path / "beat"
    assert oldest(path, 1.0) < 1.0
    process.send_signal(signal.SIGSTOP)
    assert oldest(path, 1.5) > 1.0
    process.send_signal(signal.SIGCONT)
    time.sleep(0.5)
    assert oldest(path, 1.0) < 1.0
    assert process.poll() is None


@pytest.mark.slow
def test_a_training_that_is_frozen_for_minutes_goes_on_when_it_thaws(tmp_path, watched):
    process, path = watched(1.0, "moves"), tmp_path / "beat"
    process.send_signal(signal.SIGSTOP)
    time.sleep(70)
    process.send_signal(signal.SIGCONT)
    time.sleep(1.0)
    assert oldest(path, 1.0) < 1.0
    assert process.poll() is None


def test_a_phase_that_may_last_keeps_its_heartbeat(tmp_path, watched):
    """A checkpoint, a first validation: the training does not move, and the watchdog allows it."""
    watched(30.0, "stands")
    assert oldest(tmp_path / "beat", 2.0) < 1.0


def test_a_training_that_stands_longer_than_its_watchdog_allows_has_no_heartbeat(tmp_path, watched):
    process = watched(1.0, "stands")
    process.wait(timeout=30)  # the watchdog ends it at 4.5 times its patience, for it may be reading
    assert age(tmp_path / "beat") > 2.0


def test_a_training_that_ends_leaves_no_heartbeat(tmp_path, watched):
    process = watched(30.0, "ends")
    assert process.stdout.readline() == "ended\n"
    assert not (tmp_path / "beat").exists()
