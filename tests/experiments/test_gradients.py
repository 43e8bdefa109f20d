"""Gradients by layer: the laws at initialization through the product's own networks, and what is told of numbers."""

import json
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from pipeline.experiments import gradients
from pipeline.experiments.experiment import Setting
from pipeline.experiments.gradients import GAINS, LAYERS, NETWORKS, decades, initial, measure, response, tell
from pipeline.report.looks import BINS, by_magnitude


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, 16, 16, generator=drawn), torch.randint(10, (8,), generator=drawn)


@pytest.fixture(scope="module")
def by_gain(batch) -> dict[str, dict[str, list]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {
        key: {str(gain): [initial(network, batch, gain=gain, seed=0, width=0.25)] for gain in GAINS}
        for key, network in NETWORKS.items()
    }
    torch.set_num_threads(threads)
    return found


def test_layers_are_those_of_the_longest_way(by_gain):
    for found in by_gain.values():
        assert [len(each[0]["size"]) for each in found.values()] == [LAYERS] * len(GAINS)


def test_normalized_gradients_go_with_the_inverse_of_the_scale_and_others_with_a_power_of_it(by_gain):
    for key in ("relu_bn", "sigmoid_bn"):
        assert response(by_gain[key])[0] == pytest.approx(np.log10(4), abs=0.15)  # eps, and all layers at once
    assert response(by_gain["relu"])[0] > 6
    assert response(by_gain["sigmoid"])[0] > 1.2


def test_sigmoids_let_gradients_vanish_without_normalization(by_gain):
    without, with_it = (by_gain[key]["1.0"][0]["size"] for key in ("sigmoid", "sigmoid_bn"))
    assert without[0] < without[-1] - 4  # towards the input
    assert decades({"size": without}) > decades({"size": with_it}) + 2


def test_shares_are_of_both_signs():
    counts_B = np.zeros(BINS)
    counts_B[[0, BINS - 1, BINS // 2]] = 1, 2, 1  # the outermost two, and what is too near to zero
    share_B = by_magnitude(counts_B)
    assert share_B[-1] == 0.75
    assert share_B.sum() == 0.75


def made(depth: Mapping[str, float], step: Mapping[str, float], seeds: int = 3) -> dict:
    """Layers that lie so many decades apart, and change by so many when weights are doubled."""

    def of(key: str, gain: float, seed: int) -> dict:
        size = np.linspace(-depth[key], 0, LAYERS) * (1 + seed / 100) + step[key] * np.log2(gain)
        return {"size": size.tolist(), "kurtosis": [np.log10(3)] * LAYERS, "shares": {"stem.0.conv": [0.0] * 48}}

    return json.loads(json.dumps({
        "images": "digits", "remarks": [], "steps": 90,
        "initial": {key: {str(gain): [of(key, gain, seed) for seed in range(seeds)] for gain in GAINS}
                    for key in NETWORKS},
        "trained": {key: [of(key, 1.0, seed) for seed in range(seeds)] for key in NETWORKS},
    }))  # fmt: skip


DEEP = {"relu": 1.0, "relu_bn": 2.0, "sigmoid": 8.0, "sigmoid_bn": 2.0}
STEEP = {"relu": 5.0, "relu_bn": 0.3, "sigmoid": 1.0, "sigmoid_bn": 0.3}


def test_the_verdict_is_that_of_the_intervals():
    assert tell(made(DEEP, STEEP)).holds is True
    assert tell(made({**DEEP, "sigmoid": 1.0}, STEEP)).holds is False
    assert tell(made(DEEP, {**STEEP, "relu": 0.1})).holds is False
    assert tell(made(DEEP, STEEP, seeds=1)).holds is None


def test_what_does_not_hold_for_rectifiers_is_said():
    assert "evens nothing out" in tell(made(DEEP, STEEP)).said
    assert "evens nothing out" not in tell(made({**DEEP, "relu": 3.0}, STEEP)).said


def test_numbers_come_back_in_the_table():
    rows = {row[0]: row[1:] for row in tell(made(DEEP, STEEP)).tables[0].rows}
    assert rows["sigmoid, without"] == ["8.08 ± 0.20", "8.08 ± 0.20", "2.00 ± 0.00", "3, 3"]
    assert rows["sigmoid, difference"][0] == "6.06 ± 0.15"


def test_trainings_without_a_look_leave_the_claim_open():
    nothing = made(DEEP, STEEP)
    nothing["trained"] = {key: [{"size": [], "kurtosis": [], "shares": {}}] * 3 for key in NETWORKS}
    found = tell(nothing)
    assert found.holds is None
    assert {row[2] for row in found.tables[0].rows} == {"none"}


@pytest.mark.slow
def test_it_is_measured_by_networks_and_trainings_of_the_product(tmp_path, monkeypatch):
    monkeypatch.setattr(gradients, "_SMALL", gradients._SMALL._replace(batch=8, steps=2))
    found = json.loads(json.dumps(measure(Setting(1, tmp_path / "work"))))
    for key in NETWORKS:
        (only,) = found["trained"][key]
        assert len(only["size"]) == LAYERS
        assert list(only["shares"]) == list(found["initial"][key]["1.0"][0]["shares"])
    assert tell(found).holds is None  # one seed
