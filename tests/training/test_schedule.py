import math

import pytest
import torch

from pipeline.training.schedule import Schedule


def schedule(**changes: float) -> Schedule:
    values = {
        "rate": 0.0075, "rate_batch_size": 32, "global_batch_size": 32, "images": 3200, "decay_factor": 0.96,
        "decay_epochs": 2.0,
    }  # fmt: skip
    return Schedule(**{**values, **changes})


def test_the_rate_is_stated_per_image_and_scales_with_the_global_batch():
    assert schedule().scaled_rate == 0.0075
    assert schedule(global_batch_size=256)(0) == pytest.approx(0.06)
    assert Schedule(0.045, 32, 1024, 1_281_167, 0.96, 1.3333333).scaled_rate == pytest.approx(1.44)


def test_decay_is_exponential_at_every_step_and_counts_epochs():
    s = schedule()
    assert s(0) == 0.0075
    assert s(200) == pytest.approx(0.0075 * 0.96)  # two epochs of 100 steps
    assert s(201) / s(200) == pytest.approx(s(1) / s(0))
    assert schedule(global_batch_size=64)(100) == pytest.approx(0.015 * 0.96)  # the same epochs in half the steps


def test_warm_up_goes_from_the_stated_rate_to_that_of_the_batch():
    s = schedule(global_batch_size=320, warmup_epochs=1.0, decay_factor=1.0)
    assert s(0) == pytest.approx(0.0075)
    assert s(5) == pytest.approx((0.0075 + 0.075) / 2)
    assert s(10) == s(99) == pytest.approx(0.075)
    at_the_papers_batch = schedule(warmup_epochs=1.0, decay_factor=1.0)
    assert at_the_papers_batch(0) == at_the_papers_batch(500) == 0.0075


def test_the_papers_six_million_steps_end_where_they_should():
    x30 = Schedule(0.045, 32, 32, 1_281_167, 0.96, 4 / 3)
    assert x30(6_000_000) / x30(0) == pytest.approx(0.0102, abs=1e-4)
    inception = Schedule(0.0015, 32, 32, 1_281_167, 0.96, 8.0)
    assert inception(31_000_000) / inception(0) == pytest.approx(0.0192, abs=1e-4)


@pytest.mark.parametrize("form", ["cosine", "polynomial"])
def test_the_other_forms_fall_behind_the_warm_up_to_the_final_rate_and_stay_there(form):
    s = schedule(form=form, epochs=12.0, warmup_epochs=2.0, warmup_factor=0.1, final_factor=0.25, power=2.0)
    assert s(0) == pytest.approx(0.00075)
    assert s(100) == pytest.approx(0.55 * 0.0075)
    assert s(200) == pytest.approx(0.0075)
    left = 0.7  # after 5 of 12 epochs, of which 2 warm up
    shape = 0.5 * (1 + math.cos(math.pi * 0.3)) if form == "cosine" else left**2
    assert s(500) == pytest.approx(0.0075 * (0.25 + 0.75 * shape))
    assert s(1200) == s(5000) == pytest.approx(0.25 * 0.0075)
    assert all(s(step) > s(step + 1) for step in range(200, 1200))


def test_a_cosine_without_warm_up_is_torchs():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=0.0075)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=300)
    ours = schedule(form="cosine", epochs=3.0)
    for step in range(300):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-12)
        optimizer.step()
        theirs.step()


def test_mlperfs_lars_curve_is_a_polynomial_of_power_two():
    """Rate 19.4 at 40,448 images, 24 of 70 epochs of warm-up: at epoch 47 half of the rest is left."""
    s = Schedule(19.4, 40448, 40448, 1_281_167, form="polynomial", epochs=70, warmup_epochs=24, warmup_factor=1e-9)
    step = round(47 * 1_281_167 / 40448)
    assert s(step) == pytest.approx(19.4 / 4, rel=2e-3)


def test_a_run_that_ends_elsewhere_than_its_curve_is_told_so():
    s = schedule(form="cosine", epochs=6.0)
    assert s.misfit(600) == s.misfit(595) == schedule().misfit(3) == ""
    assert "ends after 6 epochs and the run after 3: its rate stays high" in s.misfit(300)
    assert "its rate is 0 from there on" in s.misfit(900)
