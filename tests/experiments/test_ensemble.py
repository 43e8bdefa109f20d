"""Figure 4 from errors made by hand, and its way through the product's trainings and evaluations."""

import json

import numpy as np
import pytest

from pipeline.evaluation.predictions import Predictions
from pipeline.experiments import ensemble
from pipeline.experiments.ensemble import MANY, SINGLE, measure, smaller, tell
from pipeline.experiments.experiment import Setting


def scores(members: list[float], whole: float) -> dict:
    mean = float(np.mean(members))
    return {"members": members, "ensemble": whole, "difference": [whole - min(members), -0.02, 0.01],
            "by_size": [mean, (mean + whole) / 2, whole]}  # fmt: skip


def made(whole: float, repetitions: int = 3, **more: object) -> dict:
    """Members that err on 10, 12 and 14 % of the images, with views on two points less; their ensemble on `whole`."""
    each = [
        {SINGLE: scores([0.10 + n / 1000, 0.12, 0.14], whole + 0.02),
         MANY: scores([0.08 + n / 1000, 0.10, 0.12], whole)}
        for n in range(repetitions)
    ]  # fmt: skip
    measured = {"images": "digits", "val": 360, "remarks": [], "members": [0, 1, 3], "views": 10, "steps": 132,
                "full": False, "diverged": 0, "repetitions": each, **more}  # fmt: skip
    return json.loads(json.dumps(measured))


def test_the_verdict_asks_for_less_than_the_best_member():
    assert tell(made(0.06)).holds is True
    assert tell(made(0.09)).holds is False  # below the mean of 10 %, above the best
    assert tell(made(0.081)).holds is None
    assert tell(made(0.06, repetitions=1)).holds is None


def test_errors_stand_beside_those_of_the_paper():
    rows = {row[0]: row[1:] for row in tell(made(0.06)).tables[0].rows}
    assert rows["one network, 1 view"][0].startswith("12.0")
    assert rows["3 networks, 10 views"] == ["6.00 ± 0.00 %", "20.1 % (6 networks, 144 views)", "3"]


def test_views_that_harm_are_said_to():
    assert "10 views instead of one lower the error by 2.00" in tell(made(0.06)).said
    harmful = made(0.06)
    for each in harmful["repetitions"]:
        each[MANY]["members"] = [error + 0.05 for error in each[SINGLE]["members"]]
    assert "10 views instead of one raise the error by 5.00" in tell(harmful).said


def test_without_a_whole_repetition_nothing_is_claimed():
    found = tell(made(0.06, repetitions=0, diverged=3))
    assert (found.holds, found.tables, found.figures) == (None, [], [])
    assert any("3 repetitions are left out" in remark for remark in found.remarks)


def test_an_ensemble_of_some_is_the_mean_of_all_such():
    def says(*classes: int) -> Predictions:
        """Sure of one class of two for each image; all images are of class 0."""
        sure_NK = np.where(np.array(classes)[:, None] == np.arange(2), 0.9, 0.1).astype(np.float32)
        return Predictions(np.arange(3), ["a", "b", "c"], np.zeros(3, dtype=np.int64), sure_NK)

    members = [says(0, 0, 1), says(0, 1, 0), says(1, 0, 0)]  # each wrong once, elsewhere
    assert smaller(members, 1) == pytest.approx(1 / 3)
    assert smaller(members, 3) == 0.0


@pytest.mark.slow
def test_it_is_measured_by_trainings_and_evaluations_of_the_product(tmp_path, monkeypatch):
    monkeypatch.setattr(ensemble, "_DIGITS_STEPS", 1)
    setting = Setting(1, tmp_path / "work")
    found = measure(setting)
    (only,) = found["repetitions"]
    assert len(only[SINGLE]["members"]) == 3
    for name in (SINGLE, MANY):
        assert only[name]["by_size"][0] == pytest.approx(np.mean(only[name]["members"]))
        assert only[name]["by_size"][-1] == pytest.approx(only[name]["ensemble"])
    assert tell(json.loads(json.dumps(found))).holds is None
    assert measure(setting) == found  # what is there is read
