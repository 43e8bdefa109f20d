import json
import math
from pathlib import Path

import numpy as np
import pytest

from pipeline.experiments import steps
from pipeline.experiments.curve import Curve
from pipeline.experiments.images import TrainingImages
from pipeline.report.chart import drawn

STEPS = [100.0, 200.0, 300.0, 400.0]


def run(*top1: float, diverged: bool = False) -> Curve:
    return Curve(np.array(STEPS[: len(top1)]), np.array(top1), diverged)


def measured(**curves: list[Curve]) -> dict[str, object]:
    """What a measurement gives, with the claims true unless curves say otherwise; through JSON."""
    true = {
        "inception": [run(0.2, 0.3, 0.35, 0.4), run(0.2, 0.3, 0.36, 0.42)],
        "bn_baseline": [run(0.3, 0.4, 0.45, 0.5)] * 2,
        "bn_x5": [run(0.4, 0.5), run(0.41, 0.52)],
        "bn_x30": [run(0.3, 0.35), run(0.3, 0.44)],
        "bn_x5_sigmoid": [run(0.3, 0.35), run(0.31, 0.33)],
        "inception_x5": [run(0.1, 0.11), run(diverged=True)],
        "inception_sigmoid": [run(0.1, 0.1), run(0.1, 0.11)],
    } | curves
    found = {name: [each.measured() for each in runs] for name, runs in true.items()}
    return json.loads(json.dumps({"curves": found, "data": "cifar10", "classes": 10, "val": 1000, "full": False,
                                  "remarks": []}))  # fmt: skip


def cells(finding, network: str) -> list[str]:
    return next(list(row) for row in finding.tables[0].rows if row[0] == network)


def test_steps_to_a_target_lie_on_the_line_between_validations():
    assert steps.steps_to(run(0.2, 0.4), 0.3) == pytest.approx(150)
    assert steps.steps_to(run(0.2, 0.4), 0.4) == pytest.approx(200)
    assert steps.steps_to(run(0.2, 0.4, 0.1, 0.5), 0.2) == 100
    assert steps.steps_to(run(0.2, 0.4), 0.41) == math.inf
    assert steps.steps_to(run(diverged=True), 0.1) == math.inf


def test_the_baseline_reaches_its_best_at_the_validation_that_showed_it():
    base = run(0.2, 0.4, 0.3)
    assert steps.steps_to(base, base.best) == 200


def test_a_ratio_is_geometric_over_seeds():
    base = [run(0.1, 0.2, 0.3, 0.4)] * 2
    found = steps.ratio(base, [run(0.4), run(0.1, 0.4)])
    assert found.mean == pytest.approx(math.sqrt(4 * 2))
    assert found.low < 2
    assert found.high > 4  # by Student's t of two values
    assert (found.reached, found.n) == (2, 2)


def test_a_ratio_leaves_out_and_counts_seeds_that_never_came_there():
    base = [run(0.1, 0.2, 0.3, 0.4)] * 3
    found = steps.ratio(base, [run(0.4), run(0.1, 0.39), run(diverged=True)])
    assert (found.mean, found.reached, found.n) == (pytest.approx(4), 1, 3)
    assert found.said == "4.0, in 1 of 3"
    assert steps.ratio(base, [run(0.1)] * 3).said == "never reached"
    assert steps.ratio([run(diverged=True)], [run(0.1)]).reached == 0  # nothing is no target


def test_all_claims_hold_where_all_do():
    finding = steps.tell(measured())
    assert finding.holds is True
    assert [row[-1] for row in finding.tables[1].rows] == ["yes"] * 3
    # 400 / 100 and 400 / 109.1: of two values Student's t is 12.7 wide
    assert cells(finding, "BN-x5")[1:3] == ["105 ± 58", "3.8 (2.2 to 6.7)"]
    assert cells(finding, "BN-x5-Sigmoid")[1:3] == ["never", ""]
    assert cells(finding, "BN-x30")[1].endswith(", in 1 of 2")
    assert "1 diverged" in cells(finding, "Inception, rate x5")[3]


@pytest.mark.parametrize(
    ("curves", "holds"),
    [
        ({"bn_x5": [run(0.2, 0.3), run(0.2, 0.3)]}, False),  # it never gets there
        ({"bn_x5": [run(0.4, 0.5), run(0.2, 0.3)]}, None),  # one of two does
        ({"inception_sigmoid": [run(0.3), run(0.3)]}, False),  # sigmoids need no norms
        ({"inception_sigmoid": [run(0.3), run(0.1)]}, None),
        ({"bn_x5_sigmoid": [run(0.1), run(0.1)]}, False),  # nor do norms help
    ],
)
def test_a_claim_that_does_not_hold_is_said(curves, holds):
    assert steps.tell(measured(**curves)).holds is holds


@pytest.mark.parametrize(
    ("runs", "said", "holds"),
    [
        ([run(0.1), run(diverged=True)], "diverges in 1 of 2, stays at chance in 1 of 2", "yes"),
        ([run(0.2, 0.3), run(diverged=True)],
         "diverges in 1 of 2, trains in 1 of 2, to 30.0% (at its own rate 30.0% in as many steps)", "open"),
        ([run(0.2), run(0.3)], "trains in 2 of 2, to 25.0% (at its own rate 20.0% in as many steps)", "no"),
    ],
)  # fmt: skip
def test_what_five_times_the_rate_does_to_the_baseline_is_counted(runs, said, holds):
    finding = steps.tell(measured(inception_x5=runs))
    assert list(finding.tables[1].rows[1])[2:] == [said, holds]
    assert said in finding.said
    assert finding.holds is True  # it is told beside the claim


def test_one_seed_shows_no_spread_and_decides_nothing_about_steps():
    one = {name: [steps.curve(each) for each in runs[:1]] for name, runs in measured()["curves"].items()}
    finding = steps.tell(measured(**one))
    assert finding.holds is None
    assert "±" not in cells(finding, "BN-x5")[1]


def test_runs_without_a_single_validation_are_told_and_drawn():
    nothing = {name: [run(diverged=True)] * 2 for name in ("inception", "bn_x5", "inception_x5", "bn_x5_sigmoid")}
    finding = steps.tell(measured(**nothing))
    assert finding.holds is False
    assert cells(finding, "BN-x5")[1:3] == ["never", ""]
    for figure in finding.figures:
        assert drawn(figure).marks


def test_chance_is_above_what_guesses_reach():
    assert steps.chance(10, 1000) == pytest.approx(0.1285, abs=1e-4)
    assert 0.001 < steps.chance(1000, 50_000) < 0.0015


def test_rates_are_in_the_papers_ratio_and_words_differ_in_what_is_compared():
    shown = TrainingImages("cifar10", ["data=cifar10"], 2000, [], 1000, 10, Path("shards"))
    of = {network.name: dict(word.split("=", 1) for word in steps.words(network, shown, 0, full=False))
          for network in steps.NETWORKS}  # fmt: skip
    slow = float(of["inception"]["optimizer.rate"])
    rates = {name: float(found["optimizer.rate"]) / slow for name, found in of.items()}
    assert [rates[name] for name in ("bn_baseline", "bn_x5", "bn_x30", "inception_x5")] == pytest.approx([1, 5, 30, 5])
    fall = {name: float(found["schedule.decay_epochs"]) for name, found in of.items()}
    assert (
        fall["inception"] == fall["bn_baseline"] == fall["inception_x5"] == pytest.approx(6 * fall["bn_x5"], rel=1e-5)
    )
    assert fall["bn_x5"] == fall["bn_x30"] == fall["bn_x5_sigmoid"]
    alike = {name: {k: v for k, v in found.items() if k not in ("recipe", "optimizer.rate", "schedule.decay_epochs",
                                                               "trainer.max_epochs", "model.activation")}
             for name, found in of.items()}  # fmt: skip
    assert all(each == alike["inception"] for each in alike.values())
