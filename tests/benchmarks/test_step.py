import math
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.benchmarks import step
from pipeline.benchmarks.step import Cost, costs, report
from tests.multiprocess.test_resume import config


def test_what_drifts_evenly_adds_nothing():
    """Blocks come as off, on, on, off: a machine that slows down by a second a block shows a feature of 0 s."""
    cost = Cost("clocks", 1, 10, step._pairs([10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0, 17.0]))
    assert cost.pairs == [(10.0, 11.0), (13.0, 12.0), (14.0, 15.0), (17.0, 16.0)]
    assert cost.added[0] == cost.share[0] == 0.0


def test_a_share_is_of_a_block_and_of_a_minute_for_a_checkpoint():
    pairs = [(2.0, 2.5), (2.0, 2.5), (2.0, 2.7)]
    assert Cost("clocks", 1, 10, pairs).share[0] == pytest.approx(1.7 / 3 / 2)
    assert Cost("checkpoints", 1, 10, pairs).share[0] == pytest.approx(1.7 / 3 / 60)
    assert math.isnan(Cost("clocks", 1, 10, pairs[:1]).added[1])  # one pair has no spread


@pytest.fixture
def frozen(shards, tmp_path) -> Path:
    return config(shards, tmp_path, "frozen", 1, "tracking.every_steps=2", "ledger=false").directory


@pytest.mark.parametrize("feature", [step.REPORTING, step.WATCHING])
def test_blocks_with_and_without_a_feature_are_measured_and_the_run_is_left_as_it_was(frozen, tmp_path, feature):
    before = {path: path.read_bytes() for path in frozen.rglob("*") if path.is_file()}
    (cost,) = costs(frozen, tmp_path / "work", features=[feature], worlds=[1], steps=2, pairs=4)
    assert (cost.feature, cost.steps, len(cost.pairs)) == (feature, 2, 4)
    assert all(seconds > 0 for pair in cost.pairs for seconds in pair)
    assert {path: path.read_bytes() for path in frozen.rglob("*") if path.is_file()} == before
    assert report([cost]).row_count == 1
    there = {path.name for path in (tmp_path / "work" / f"{feature}-1").iterdir()}
    assert {"norms.csv", "percentiles.csv", "gradients.csv"} <= there or feature != step.WATCHING
    assert "metrics.csv" in there


def test_an_unknown_feature_is_refused_with_the_known_ones(capsys, frozen):
    assert cli.main(["bench", "step", str(frozen), "--only", "coffee"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "coffee" in line
    assert "reporting" in line
