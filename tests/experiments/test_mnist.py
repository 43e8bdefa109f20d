"""Figure 1 from numbers made by hand: what is more stable is measured as such, also where there is little to see."""

import json

import numpy as np
import pytest

from pipeline.experiments.curve import Curve
from pipeline.experiments.experiment import Setting
from pipeline.experiments.mnist import NETWORKS, NORMED, PLAIN, measure, movement, tell

STEPS = np.arange(1.0, 101.0)


def looks(median: np.ndarray, half: np.ndarray) -> list[list[float]]:
    return np.stack([STEPS, median - half, median, median + half], axis=1).tolist()


STILL, STEADY = np.zeros(100), np.ones(100)
WANDERING, WIDENING = np.linspace(0, 4, 100), np.linspace(0.1, 2, 100)


def made(with_it: list[float], without: list[float], *, stable: bool = True, seeds: int = 3) -> dict:
    """Curves of each network, nearly the same for all seeds; the one with norms stays, or wanders."""
    ways = [(WANDERING, WIDENING), (STILL, STEADY)] if stable else [(STILL, STEADY), (WANDERING, WIDENING)]
    networks = {}
    for recipe, top1, way in zip((PLAIN, NORMED), (without, with_it), ways, strict=True):
        networks[recipe] = [
            {"curve": Curve(np.arange(1.0, len(top1) + 1), np.array(top1) + seed / 1e4).measured(),
             "percentiles": looks(*way)}
            for seed in range(seeds)
        ]  # fmt: skip
    return json.loads(json.dumps({"images": "digits", "remarks": ["so"], "steps": 100, "networks": networks}))


def test_a_median_moves_in_units_of_its_spread():
    moved, changed = movement(np.array(looks(WANDERING, STEADY)))
    assert moved == pytest.approx(4 * 90 / 99 / 2)  # between the means of the first tenth and the last
    assert changed == pytest.approx(1.0)
    assert movement(np.array(looks(10 * WANDERING, 10 * STEADY)))[0] == pytest.approx(moved)


def test_what_stays_does_not_move_and_its_noise_is_averaged():
    assert movement(np.array(looks(STILL, STEADY))) == (0.0, 1.0)
    noise = np.random.default_rng(0).normal(0, 0.2, 100)
    assert movement(np.array(looks(noise, STEADY)))[0] < np.ptp(noise) / 2 / 3


def test_a_spread_changes_by_its_largest_over_its_smallest():
    assert movement(np.array(looks(STILL, np.repeat([0.5, 2.0], 50))))[1] == pytest.approx(4.0)


def test_the_verdict_is_that_of_the_intervals():
    better, worse = [0.8, 0.9], [0.5, 0.8]
    assert tell(made(better, worse)).holds is True
    assert tell(made(worse, better)).holds is False
    assert tell(made(better, worse, stable=False)).holds is False
    assert tell(made(better, worse, seeds=1)).holds is None  # one seed has no interval
    assert tell(made([0.8, 0.9], [0.5, 0.9])).holds is None  # sooner, and no higher


def test_what_is_said_and_drawn_is_of_the_numbers():
    found = tell(made([0.8, 0.9], [0.5, 0.8]))
    assert "10.0 ± 0.0 points higher" in found.said
    assert "20.0 ± 0.0 points" in found.said
    accuracy, without, with_it = found.figures
    assert [line.name for line in accuracy.lines] == list(NETWORKS.values())
    assert (without.low, without.high) == (with_it.low, with_it.high)  # the eye compares them
    assert found.tables[0].rows[-1][-2:] == ["10.0 ± 0.0", "3"]
    assert found.remarks[0] == "so"


def test_runs_that_ended_before_there_was_anything_to_see_are_told():
    nothing = made([0.8, 0.9], [0.5, 0.8])
    for each in nothing["networks"][PLAIN]:
        each |= {"curve": Curve(np.array([]), np.array([]), diverged=True).measured(), "percentiles": []}
    found = tell(nothing)
    assert found.holds is None
    assert len(found.tables) == 1


@pytest.mark.slow
def test_it_is_measured_by_trainings_of_the_product(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.experiments.mnist._STEPS", 46)
    monkeypatch.setattr("pipeline.experiments.mnist._EPOCHS", 2)
    found = measure(Setting(1, tmp_path / "work"))
    for recipe in NETWORKS:
        (only,) = found["networks"][recipe]
        assert only["curve"]["step"] == [23.0, 46.0]
        assert [row[0] for row in only["percentiles"]] == list(range(1, 47))
    told = tell(json.loads(json.dumps(found)))
    assert told.holds is None
    assert "28x28" in told.remarks[1]
