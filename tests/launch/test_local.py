"""The launcher with real processes: a stand-in for `pipeline` behind the same interpreter call."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
mode = sys.argv[1]
print("rank", rank, "of", os.environ["WORLD_SIZE"], "threads", os.environ["OMP_NUM_THREADS"], flush=True)
if mode == "codes":
    sys.exit(int(sys.argv[2].split(",")[rank]))
if mode == "crash" and rank == 1:
    print("the reason", file=sys.stderr, flush=True); sys.exit(9)
def note(number, frame):
    if mode == "deaf":
        return open(f"heard-{rank}", "w").close()
    print("signal", number, flush=True); sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
    signal.signal(number, note)
open(f"ready-{rank}", "w").close()
while True:
    time.sleep(60)
"""
RUN = """
import sys
from pathlib import Path
from pipeline.launch import local
local._GRACE_SECONDS = local._KILLED_GRACE_SECONDS = 0.5
print("launcher", flush=True)
sys.exit(local.run_processes(sys.argv[1:], processes=2, threads=1, logs=Path("logs")))
"""


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """Starts the launcher over a package called `pipeline` whose __main__ is SCRIPT."""
    (tmp_path / "fake" / "pipeline").mkdir(parents=True)
    (tmp_path / "fake" / "pipeline" / "__main__.py").write_text(SCRIPT)
    real = Path(__file__).parents[2]
    for part in ("__init__.py", "launch"):
        (tmp_path / "fake" / "pipeline" / part).symlink_to(real / "pipeline" / part)
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "fake")}
    started = []

    def start(*words: str) -> subprocess.Popen:
        command = [sys.executable, "-c", RUN, *words]
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(*paths: str) -> None:
    deadline = time.monotonic() + 30
    while not all(Path(path).exists() for path in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.02)


def test_every_rank_runs_and_rank_0_keeps_the_terminal(launcher):
    process = launcher("codes", "0,0")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "rank 0 of 2 threads 1" in output
    assert "rank 1 of 2" in Path("logs/rank-1.log").read_text()


@pytest.mark.parametrize(
    ("codes", "status"), [("0,75", 75), ("3,3", 3), ("75,75", 75), ("75,3", 3), ("2,2", 2), ("1,3", 3), ("0,0", 0)]
)
def test_the_status_is_75_only_if_no_rank_failed_otherwise(launcher, codes, status):
    process = launcher("codes", codes)
    process.communicate(timeout=30)
    assert process.returncode == status


def test_one_rank_that_dies_ends_all_and_its_last_words_are_shown(launcher):
    process = launcher("crash")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 9
    assert "rank 1 ended first" in errors
    assert "the reason" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_signals_reach_every_rank_and_75_comes_back(launcher, number):
    process = launcher("wait")
    wait_for("ready-0", "ready-1")
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert f"signal {int(number)}" in output
    assert f"signal {int(number)}" in Path("logs/rank-1.log").read_text()


def test_a_second_interrupt_ends_ranks_that_do_not_hear(launcher):
    process = launcher("deaf")
    wait_for("ready-0", "ready-1")
    process.send_signal(signal.SIGINT)
    wait_for("heard-0", "heard-1")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)  # far below the 120 seconds after a first one
    assert process.returncode == 75


def test_no_rank_outlives_a_killed_launcher(launcher):
    process = launcher("wait")
    wait_for("ready-0", "ready-1")
    process.kill()
    deadline = time.monotonic() + 10
    while f"signal {int(signal.SIGTERM)}" not in Path("logs/rank-1.log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
