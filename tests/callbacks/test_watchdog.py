"""Who is named, on made-up reports; what is seen of a stack; how a watch without peers ends a process."""

import json
import subprocess
import sys
import time

import pytest

from pipeline.callbacks.suspicion import BROKEN, FAILED, Report, in_collective, limit, suspects
from pipeline.launch.failure import FailedRunError, death, leave_verdict, read_verdict, shown
from pipeline.launch.pulse import PULSES, Place, Pulse, read_place


def report(rank: int, phase: str = "forward", step: int = 7, *, age: float = 50, limit: float = 40,
           waiting: bool = True, trouble: str = "", number: int | None = None) -> Report:  # fmt: skip
    return Report(rank, f"node{rank // 2}", phase, step, 0, step if number is None else number, age, limit, waiting,
                  "a.py:1 in f", trouble)  # fmt: skip


def named(
    *reports: Report, silent: dict[int, float] | None = None, patience: float = 40
) -> tuple[list[int], str] | None:
    found = suspects(reports, silent or {}, patience=patience)
    return None if found is None else ([r.rank for r in found.reports], found.reason)


def test_the_rank_outside_of_the_collective_is_named_and_those_inside_are_not():
    assert named(report(0), report(1, waiting=False), report(2)) == ([1], "stands")


def test_a_rank_that_stands_in_loading_is_named_while_the_others_wait_in_the_forward():
    assert named(report(0), report(1, "loading", waiting=False), report(2)) == ([1], "stands")


def test_nobody_is_named_while_the_one_all_wait_for_is_within_its_own_limit():
    assert named(report(0), report(1, "loading", waiting=False, limit=300), report(2)) is None


def test_nobody_is_named_before_the_limit():
    assert named(report(0, age=39), report(1, age=39), report(2, age=39)) is None
    assert named(report(0, age=39), report(1, age=39, waiting=False), report(2, age=39)) is None


def test_where_no_stack_decides_the_least_advanced_rank_is_named():
    """On a GPU the others run ahead until something waits for the device: none is inside a collective."""
    assert named(report(0, step=9, waiting=False), report(1, step=8, waiting=False)) == ([1], "stands")
    ahead = [report(r, "optimizer", waiting=False) for r in (0, 2)]
    assert named(ahead[0], report(1, "backward", waiting=False), ahead[1]) == ([1], "stands")
    assert named(report(0, waiting=False), report(1, waiting=False)) == ([0, 1], "stands")


def test_ranks_in_collectives_that_do_not_meet_are_told_apart_by_their_steps():
    assert named(report(0, "checkpoint"), report(1, "optimizer"), report(2, "checkpoint")) == ([1], "meet")
    assert named(report(0), report(1)) == ([0, 1], "meet")


def test_a_silent_rank_is_named_at_the_step_that_the_others_have_reached():
    found = suspects([report(0), report(1, step=6, age=0), report(2)], {1: 50, 2: 1}, patience=40)
    assert found is not None
    assert (found.reason, [(r.rank, r.step, r.phase) for r in found.reports]) == ("silent", [(1, 7, "forward")])
    assert found.excess == pytest.approx(50 / 40)
    broken = report(0, age=1, trouble=BROKEN)
    assert named(broken, report(1, age=1), silent={1: 5}, patience=4) == ([1], "silent")
    assert named(broken, report(1, age=1), silent={1: 3}, patience=4) is None


def test_a_rank_that_failed_by_itself_is_named_when_it_is_gone():
    assert named(report(0), report(1, age=0, trouble=FAILED), silent={1: 6}) == ([1], "failed")
    assert named(report(0, age=1), report(1, age=0, trouble=FAILED), silent={1: 2}) is None


def test_a_rank_that_is_done_is_not_missed():
    assert named(report(0, "end"), report(1, age=1, waiting=False), silent={0: 100}) is None


def test_the_limit_grows_with_what_was_seen_and_spares_what_was_not_seen_twice():
    usual = {"hang_seconds": 40.0, "first_seconds": 300.0}
    assert limit("forward", seen=0, longest=0.0, **usual) == 300
    assert limit("forward", seen=1, longest=200.0, **usual) == 600
    assert limit("forward", seen=2, longest=1.0, **usual) == 40
    assert limit("forward", seen=99, longest=30.0, **usual) == 90
    assert limit("end", seen=0, longest=0.0, **usual) == float("inf")


def test_a_stack_tells_whether_a_rank_waits():
    inside = [("run.py", "train"), ("/x/torch/distributed/c10d_logger.py", "wrapper")]
    assert in_collective(inside, "forward")
    forward = [("/x/torch/nn/parallel/distributed.py", "forward"), ("/x/pipeline/norm/kernels.py", "f")]
    assert not in_collective(forward, "forward")
    assert in_collective([("/x/pipeline/callbacks/agreement.py", "_arrived")], "optimizer")
    backward = [("/x/torch/autograd/graph.py", "_engine_run_backward")]
    assert in_collective(backward, "gradients")
    assert not in_collective(backward, "backward")


def test_a_pulse_outlives_its_process(tmp_path):
    code = """import os, sys; from pathlib import Path; from pipeline.launch.pulse import Pulse
p = Pulse(Path(sys.argv[1])); p.move('loading', 3, 0, 2); p.move('forward'); os.kill(os.getpid(), 9)"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "p")], check=False).returncode == -9
    assert read_place(tmp_path / "p") == Place(2, "forward", 3, 0, 2)
    assert read_place(tmp_path / "none") is None


def test_a_pulse_knows_how_long_its_phases_took():
    pulse = Pulse()
    pulse.move("loading", 1, 0, 0)
    time.sleep(0.02)
    pulse.move("forward")
    pulse.move("loading", 2, 0, 1)
    assert pulse.longest["loading"] >= 0.02
    assert (pulse.seen["loading"], pulse.seen["forward"], pulse.place.number) == (1, 1, 1)


def test_the_first_verdict_counts(tmp_path, monkeypatch):
    assert not leave_verdict(FailedRunError("nobody listens"))
    monkeypatch.setenv(PULSES, str(tmp_path))
    assert read_verdict(tmp_path) is None
    assert leave_verdict(FailedRunError("one", code=75, restart=True))
    (tmp_path / "other").mkdir()
    assert leave_verdict(FailedRunError("two"))
    verdict = read_verdict(tmp_path)
    assert verdict is not None
    assert (str(verdict), verdict.code, verdict.restart) == ("one", 75, True)


def test_a_death_from_outside_is_resumable_and_a_crash_is_not():
    place = Place(9, "forward", 4, 0, 3)
    killed = death(1, 3, "node7", -9, place, lambda rank, epoch, number: [f"key{rank}{epoch}{number}"])
    assert str(killed).startswith("rank 1 of 3 on node7 was killed by signal 9 (SIGKILL) in step 4 (epoch 1, forward, "
                                  "samples key103)")  # fmt: skip
    assert killed.code == 75
    crashed = death(0, 2, "node7", -11, None, lambda *_: [])
    assert (str(crashed), crashed.code) == ("rank 0 of 2 on node7 was killed by signal 11 (SIGSEGV)", 1)
    assert "/dev/shm" in str(death(0, 2, "node7", -7, None, lambda *_: []))


def test_many_keys_are_counted():
    assert shown([str(n) for n in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
    assert shown([]) == "none"


ALONE = """
import sys, threading, time
from pathlib import Path
from pipeline.callbacks import watchdog
from pipeline.launch.pulse import Pulse
import torch
watchdog.TICK = 0.1
w = watchdog.Watchdog(Pulse(), rank=0, world=1, host="here", hang_seconds=0.5, first_seconds=0.5,
                      logs=Path(sys.argv[1]), name=lambda *_: ["k1", "k2"], hint="go on with X", say=print)
w.setup(None, torch.nn.Linear(1, 1), "fit")
w.pulse.move("forward", 5, 0, 4)
time.sleep(60)
"""


def test_a_single_process_that_hangs_names_itself_and_ends(tmp_path):
    ended = subprocess.run([sys.executable, "-c", ALONE, str(tmp_path)], capture_output=True, text=True, timeout=50,
                           check=False)  # fmt: skip
    assert ended.returncode == 75, ended.stderr
    assert ended.stdout.startswith("WARNING: rank 0 of 1 on here has stood still")
    assert "in step 5 (epoch 1, forward, samples k1, k2)" in ended.stderr
    assert ended.stderr.rstrip().endswith("go on with X")
    assert "time.sleep" in (tmp_path / "rank-0.log").read_text() or "<module>" in (tmp_path / "rank-0.log").read_text()
    assert json.loads((tmp_path / "failures.jsonl").read_text())["ranks"][0]["keys"] == ["k1", "k2"]
