"""Trainings of an experiment: each once, each by itself, and what diverges is a result."""

import signal
import subprocess
import sys
import time

import pytest

from pipeline.experiments.experiment import Setting
from pipeline.experiments.images import images
from pipeline.experiments.trainings import trained
from pipeline.launch.failure import FailedRunError
from pipeline.report.record import read_run

SHORT = ["recipe=mlp_sigmoid_bn", "trainer.max_steps=6", "norm.precise_images=64", "tracking.percentiles_every_steps=0",
         "tracking.gradients_every_steps=0", "tracking.norms_every_steps=0"]  # fmt: skip


def test_a_training_is_done_once_and_one_without_numbers_is_known_for_it(tmp_path):
    seen: list[tuple[int, int]] = []
    setting = Setting(1, tmp_path / "work", progress=lambda done, total, what: seen.append((done, total)))
    of = images(setting, ("mnist",))
    diverging = ["model.name=mlp", "model.activation=relu", "optimizer.rate=1e6"]
    wanted = {"good": [*SHORT, *of.words], "bad": [*SHORT, *of.words, *diverging]}
    first = trained(wanted, setting)
    assert first["good"].curve.step_V.tolist() == [6.0]
    assert not first["good"].curve.diverged
    assert (first["bad"].curve.diverged, first["bad"].curve.last) == (True, 0.0)
    assert seen[-1] == (2, 2)
    seen.clear()
    again = trained(wanted, setting)
    assert seen == [(2, 2)]
    assert again["good"].curve.top1_V.tolist() == first["good"].curve.top1_V.tolist()


def test_a_training_that_cannot_begin_says_why(tmp_path):
    with pytest.raises(FailedRunError, match=r"^typo: .*optimizer\.rat") as raised:
        trained({"typo": [*SHORT, "optimizer.rat=1"]}, Setting(1, tmp_path / "work"))
    assert raised.value.code == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_experiment_keeps_its_trainings_and_goes_on(tmp_path, number):
    command = [sys.executable, "-m", "pipeline", "reproduce", "scale_invariance", "--seeds", "1", "--output",
               str(tmp_path)]  # fmt: skip
    work = tmp_path / "work" / "scale_invariance"
    first = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 200
    while len(list(work.glob("*.log"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(3.0)
    first.send_signal(number)
    _, said = first.communicate(timeout=120)
    assert first.returncode == 75
    assert said.strip() == "pipeline: interrupted; the same command goes on from there"
    done = {
        path: path.stat().st_mtime_ns for path in work.glob("*/metrics.csv") if read_run(path.parent).state == "done"
    }
    assert done
    again = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
    assert f"  {len(done)} of 8: " in again.stdout
    assert {path: path.stat().st_mtime_ns for path in done} == done
