"""One run a directory, through crashes and on file systems where flock does not hold."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest

from pipeline.launch import lock as module
from pipeline.launch.lock import LOCK, LockedError, locked, this_process

HOLD = """
import sys, time
from pathlib import Path
from pipeline.launch.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_is_refused_with_the_name_of_the_first(tmp_path, holder):
    with pytest.raises(
        LockedError, match=rf"belongs to a run that is going on: process {holder.pid} on .*; wait for it"
    ):
        locked(tmp_path).__enter__()


def test_the_lock_of_a_killed_run_is_taken_over_at_once(tmp_path, holder):
    holder.kill()
    holder.wait()
    began = time.monotonic()
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert time.monotonic() - began < 5
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_another_machine_is_taken_over_when_nobody_touches_it(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STALE_AFTER", 0.5)
    (tmp_path / LOCK).write_text(json.dumps(asdict(replace(this_process(), host="elsewhere"))))
    said = []
    with locked(tmp_path, said.append):
        pass
    assert "is held from elsewhere; watching" in said[0]


def test_a_lock_of_another_machine_that_is_touched_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STALE_AFTER", 5.0)
    path = tmp_path / LOCK
    path.write_text(json.dumps(asdict(replace(this_process(), host="elsewhere"))))
    threading.Timer(0.7, os.utime, [path]).start()
    with pytest.raises(LockedError, match="on elsewhere"):
        locked(tmp_path, lambda text: None).__enter__()


def test_the_holder_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TOUCHED_EVERY", 0.05)
    with locked(tmp_path):
        first = (tmp_path / LOCK).stat().st_mtime_ns
        for _ in range(100):
            time.sleep(0.05)
            if (tmp_path / LOCK).stat().st_mtime_ns > first:
                break
        else:
            pytest.fail("not touched")


def test_of_many_that_find_a_stale_lock_one_takes_it(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps(asdict(replace(this_process(), process=2**22 - 1, began=1))))
    processes = [
        subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(4)
    ]
    try:
        deadline = time.monotonic() + 20
        while sum(p.poll() is None for p in processes) > 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert sum(p.poll() is None for p in processes) == 1
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_mounted_bucket_which_has_no_links_is_locked_all_the_same(tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(5, "Input/output error")  # what rclone says

    monkeypatch.setattr(module.os, "link", link)
    monkeypatch.setattr(module, "STALE_AFTER", 0.5)
    monkeypatch.setattr(module, "TOUCHED_EVERY", 0.1)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
        with pytest.raises(LockedError), locked(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []
    stale = replace(this_process(), host="elsewhere")
    (tmp_path / LOCK).write_text(json.dumps(asdict(stale)))
    with locked(tmp_path):
        assert module._holder(tmp_path / LOCK) == this_process()


def test_the_lock_of_another_container_on_this_host_is_taken_over_when_nobody_touches_it(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STALE_AFTER", 0.5)
    here = this_process()
    assert here.space.isdigit()
    (tmp_path / LOCK).write_text(json.dumps(asdict(replace(here, space="1"))))  # alive or not: its number says nothing
    said = []
    with locked(tmp_path, said.append):
        pass
    assert f"is held from {here.host}; watching" in said[0]


def test_a_run_in_another_container_on_this_host_is_respected(tmp_path):
    """Which shares the host's name and counts its processes anew, as on the host's network."""
    apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(apart, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        if process.stdout.readline() != "held\n":
            pytest.skip(f"no process namespace of its own: {process.communicate()[1].strip()}")
        with pytest.raises(LockedError, match="belongs to a run that is going on: process 1 on"):
            locked(tmp_path, lambda text: None).__enter__()
    finally:
        process.kill()
        process.communicate()
