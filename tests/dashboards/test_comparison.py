import math

import pytest

from pipeline.dashboards.comparison import RunSet, compare
from pipeline.report.making import read_runs
from pipeline.report.record import NotARunError
from tests.report.runs import simple


def made(directory, **named):
    """A run of each name, by its best top-1 and how slow it is, or by more of its config."""
    for name, (best, slowness, recipe, rate) in named.items():
        simple(directory / name, best, slowness, run={"id": name, "recipe": recipe, "data": "digits"},
               optimizer={"rate": rate})  # fmt: skip
    return read_runs([directory / name for name in named])


RUNS = {"base": (0.8, 2, "bn_baseline", 0.1), "fast": (0.9, 1, "bn_x5", 0.5), "again": (0.7, 1, "bn_x5", 0.5)}


def test_runs_of_a_recipe_are_one_run_set(tmp_path):
    runs = made(tmp_path, **RUNS)
    for number, run in enumerate(runs):
        run.wandb_id = f"id{number}"
    found = compare(runs, [0.8])
    assert found.run_sets == [RunSet("bn_baseline", ["id0"]), RunSet("bn_x5", ["id1", "id2"])]
    assert found.title == "bn_baseline, bn_x5 on digits"


def test_the_order_in_which_runs_are_named_makes_no_other_comparison(tmp_path):
    runs = made(tmp_path, **RUNS)
    assert compare(runs, [0.8]).key == compare(runs[::-1], [0.8]).key
    assert compare(runs, [0.8]).key != compare(runs[1:], [0.8]).key


def test_steps_to_target_are_compared_with_those_of_the_first_run(tmp_path):
    lines = compare(made(tmp_path, **RUNS), [0.8]).scores.splitlines()
    assert lines[1] == "| run | recipe | state | steps | steps to 80 % | time | × fewer steps | best top-1 |"
    assert [line.split(" | ")[4:] for line in lines[3:]] == [
        ["40", "81 s", "1", "80 % |"],
        ["20", "21 s", "2", "90 % |"],
        ["never", "–", "–", "70 % |"],
    ]


def test_without_a_target_there_is_no_column_of_it(tmp_path):
    assert "steps to" not in compare(made(tmp_path, **RUNS), [math.nan]).scores


def test_differences_are_those_of_configs_and_not_of_names(tmp_path):
    text = compare(made(tmp_path, **RUNS), [0.8]).differences
    assert "| optimizer.rate | 0.1 | 0.5 | 0.5 |" in text
    assert "run.id" not in text
    assert compare(made(tmp_path / "b", **dict.fromkeys("xy", RUNS["fast"])), []).differences.endswith(
        "The runs have the same config."
    )


def test_text_of_a_run_breaks_no_table(tmp_path):
    runs = made(tmp_path, a=(0.8, 1, "x|y\n<b>", 0.1), b=(0.8, 1, "z", 0.1))
    found = compare(runs, [0.8])
    lines = [*found.scores.splitlines()[1:], *found.differences.splitlines()[1:]]
    assert "x\\|y &lt;b>" in lines[2]
    assert {line.replace("\\|", "").count("|") for line in found.scores.splitlines()[1:]} == {9}


def test_a_title_is_no_longer_than_wandb_takes(tmp_path):
    found = compare(made(tmp_path, a=(0.8, 1, "r" * 200, 0.1)), [0.8])
    assert len(found.title) == 128


def test_a_run_without_its_id_is_refused(tmp_path):
    (run,) = made(tmp_path, a=RUNS["base"])
    (run.directory / "run.json").unlink()
    with pytest.raises(NotARunError, match="by which W&B knows the run"):
        compare(read_runs([run.directory]), [0.8])
