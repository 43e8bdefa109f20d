"""Trainings of an experiment: each once, each by itself, and what diverges is a result."""

import pytest

from pipeline.experiments.experiment import Setting
from pipeline.experiments.images import images
from pipeline.experiments.trainings import trained
from pipeline.launch.failure import FailedRunError

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
