import pytest

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
