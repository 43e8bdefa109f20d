"""What looks into the network sees the paper's contrast, changes no bit, and survives an interruption."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.callbacks.histogram import EDGES_E
from pipeline.callbacks.segments import segments
from pipeline.callbacks.wandb_reporter import _logged
from pipeline.cli.settling import settled
from pipeline.config import ConfigError, compose_config
from pipeline.launch.plan import open_run, read_record
from tests.multiprocess.ranks import run_ranks
from tests.multiprocess.test_resume import config, final, train_rank

LOOKS = ("tracking.percentiles_every_steps=2", "tracking.gradients_every_steps=3")


def lines(directory: Path, name: str) -> list[dict[str, str]]:
    with (directory / name).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def figure_one(tmp_path_factory):
    """The network of section 4.1 with and without batch normalization, 120 steps of 60 digits."""
    directory = tmp_path_factory.mktemp("runs")
    for recipe in ("mlp_sigmoid", "mlp_sigmoid_bn"):
        composed = compose_config(
            [f"recipe={recipe}", "data=digits", f"data.root={directory / 'digits'}", f"run.dir={directory}",
             f"run.id={recipe}", "data.global_batch_size=60", "trainer.max_steps=120", "trainer.threads=1",
             "trainer.validate_every_epochs=0", "cluster.accelerator=cpu", "tracking.gradients_every_steps=60",
             "tracking.mode=disabled"]
        )  # fmt: skip
        assert run_ranks(1, train_rank, open_run(settled(composed)), 0) == [False]
    return directory


def test_percentiles_of_a_hidden_unit_show_the_contrast_of_figure_1(figure_one):
    seen = {}
    for recipe in ("mlp_sigmoid", "mlp_sigmoid_bn"):
        rows = [row for row in lines(figure_one / recipe, "percentiles.csv") if row["unit"] == "50"]
        assert [int(row["step"]) for row in rows] == list(range(10, 121, 10))
        assert {row["layer"] for row in rows} == {"hidden.2.norm"}
        seen[recipe] = np.array([[float(row[p]) for p in ("p15", "p50", "p85")] for row in rows]).T
    low, middle, high = seen["mlp_sigmoid"]
    assert (
        np.abs(middle) > 3 * (high - low)
    ).all()  # off its centre by several widths: which image it is counts little
    assert (high - low < 0.3).all()  # in the straight part of the sigmoid
    low, middle, high = seen["mlp_sigmoid_bn"]
    assert (np.abs(middle) < 0.25 * (high - low)).all()
    assert ((high - low > 1.6) & (high - low < 2.9)).all()  # 2.07 of a Gaussian


def test_gradients_vanish_towards_the_first_layer_without_norm_alone(figure_one):
    ratio = {}
    for recipe in ("mlp_sigmoid", "mlp_sigmoid_bn"):
        rows = lines(figure_one / recipe, "gradients.csv")
        by_layer = {row["layer"]: float(row["deviation"]) for row in rows if row["step"] == "120"}
        assert list(by_layer) == ["hidden.0.linear", "hidden.1.linear", "hidden.2.linear", "classifier"]
        ratio[recipe] = by_layer["hidden.0.linear"] / by_layer["hidden.2.linear"]
        for row in rows:
            counts = [int(count) for count in row["counts"].split()]
            assert len(counts) == len(EDGES_E) - 1
            assert 0 < sum(counts) <= int(row["values"])
    assert ratio["mlp_sigmoid"] < 0.25
    assert ratio["mlp_sigmoid_bn"] > 0.75


@pytest.mark.parametrize("world", [1, 2])
def test_looking_changes_no_bit_of_a_run(shards, tmp_path, world):
    for name, more in (("blind", ()), ("seeing", (*LOOKS, "tracking.layers=[body.5*,stem.0*]"))):
        settings = config(shards, tmp_path, name, world, *more)
        assert run_ranks(world, train_rank, settings, 0) == [False] * world
    blind, seeing = (final(tmp_path / name)["state_dict"] for name in ("blind", "seeing"))
    assert all(torch.equal(blind[key], seeing[key]) for key in blind)
    assert not (tmp_path / "blind" / "percentiles.csv").exists()
    assert {row["layer"].split(".")[0] for row in lines(tmp_path / "seeing", "percentiles.csv")} == {"stem", "body"}


def test_an_interrupted_run_has_each_look_once(shards, tmp_path):
    for stop_at in (7, 0):
        settings = config(shards, tmp_path, "run", 1, *LOOKS, "tracking.every_steps=3", "tracking.mode=offline")
        assert run_ranks(1, train_rank, settings, stop_at) == [bool(stop_at)]
    seen, steps = lines(tmp_path / "run", "percentiles.csv"), [2, 4, 6, 8, 10, 12, 14]
    assert [(int(row["step"]), row["unit"] == "all") for row in seen] == [(s, u) for s in steps for u in (False, True)]
    seen = lines(tmp_path / "run", "gradients.csv")
    assert list(dict.fromkeys(int(row["step"]) for row in seen)) == [3, 6, 9, 12, 15]
    assert len(seen) == 5 * len({row["layer"] for row in seen})


def test_wandb_gets_the_same_figures_with_the_row_of_their_step(shards, tmp_path):
    settings = config(shards, tmp_path, "run", 1, *LOOKS, "tracking.every_steps=3", "tracking.mode=offline")
    assert run_ranks(1, train_rank, settings, 0) == [False]
    (segment,) = segments(tmp_path / "run", read_record(tmp_path / "run").wandb_id)
    rows = {row["step"]: row for row in segment.rows() if "train/loss" in row}
    for each in lines(tmp_path / "run", "gradients.csv"):
        row = rows[int(each["step"])]
        there = row[f"gradients/{each['layer']}"]
        assert there["_type"] == "histogram"
        again = _logged(row)[f"gradients/{each['layer']}"].to_json()  # as `pipeline sync` sends the rest of a segment
        assert (again["values"], again["bins"]) == (there["values"], there["bins"])
        assert there["values"] == [int(count) for count in each["counts"].split()]
        assert f"{row['gradients/' + each['layer'] + '/deviation']:.4g}" == each["deviation"]
    newest = [row for row in lines(tmp_path / "run", "percentiles.csv") if row["step"] == "6"]
    layer = newest[0]["layer"]
    for kind, each in zip(("unit", "all"), newest, strict=True):
        for percentile in ("p15", "p50", "p85"):
            assert f"{rows[6][f'percentiles/{layer}/{kind}/{percentile}']:.4g}" == each[percentile]


def test_patterns_that_fit_no_layer_are_refused_with_names(shards, tmp_path):
    settings = config(shards, tmp_path, "run", 1, *LOOKS, "tracking.layers=[fc*]")
    with pytest.raises(Exception, match=r"tracking.layers = \['fc\*'\] fits none of the 69 layers .*stem") as caught:
        run_ranks(1, train_rank, settings, 0)
    assert ConfigError.__name__ in str(caught.value) or isinstance(caught.value, ConfigError)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["wandb_id"]
