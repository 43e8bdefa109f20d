"""The verb: what it says, what it leaves, and what it refuses."""

from dataclasses import replace

import pytest

from pipeline import cli
from pipeline.data.shards import DataError
from pipeline.experiments import catalog
from pipeline.experiments.catalog import EXPERIMENTS
from pipeline.launch.lock import locked
from tests.experiments.test_result import made


def reproduce(*words):
    return cli.main(["reproduce", *map(str, words)])


def test_all_leaves_a_page_of_each_and_one_of_all_and_goes_on(tmp_path, monkeypatch, capsys):
    (first, calls), (second, _) = made(True, "first"), made(False, "second")
    monkeypatch.setattr(catalog, "EXPERIMENTS", (first, second))
    output = tmp_path / "out"
    assert reproduce("all", "--output", output, "--markdown", tmp_path / "found.md") == 0
    for place in ("index.html", "first/index.html", "first/result.json", "first/made-values.png", "second/index.html"):
        assert (output / place).is_file(), place
    assert "does not hold here" in (tmp_path / "found.md").read_text()
    said = capsys.readouterr().out
    assert "1 of 2: Things are first" in said
    assert "holds here" in said
    assert reproduce("first", "--output", output) == 0
    assert len(calls) == 1
    assert "and kept; --again measures anew" in capsys.readouterr().out
    assert "Things are second" in (output / "index.html").read_text()
    assert reproduce("first", "--output", output, "--again") == 0
    assert reproduce("first", "--output", output, "--seeds", 5) == 0
    assert len(calls) == 3


def test_the_list_tells_every_claim_its_source_and_its_minutes(capsys):
    assert reproduce("--list") == 0
    said = " ".join(capsys.readouterr().out.split())
    for each in EXPERIMENTS:
        assert each.name in said
        assert " ".join(each.claim.split()) in said
        assert each.source in said
        assert f"{each.minutes:g} min, {each.seeds} seeds" in said


def test_every_experiment_is_called_as_its_module_and_ends_in_ten_minutes():
    for each in EXPERIMENTS:
        assert each.measure.__module__ == f"pipeline.experiments.{each.name}"
        assert f"pipeline reproduce {each.name}" in (__import__(each.measure.__module__, fromlist=["x"]).__doc__ or "")
        assert each.minutes <= 10
        assert each.seeds >= 3
    assert sum(each.minutes for each in EXPERIMENTS) <= 75


def test_what_was_measured_before_a_failure_has_its_page(tmp_path, monkeypatch, capsys):
    (first, _), (second, _) = made(True, "first"), made(False, "second")

    def fail(setting):
        raise DataError("no such images")

    monkeypatch.setattr(catalog, "EXPERIMENTS", (first, replace(second, measure=fail)))
    assert reproduce("all", "--output", tmp_path) == 3
    assert "Things are first" in (tmp_path / "index.html").read_text()
    assert capsys.readouterr().err == "pipeline: no such images\n"


def test_two_calls_do_not_share_an_output(tmp_path, capsys):
    with locked(tmp_path / "work"):
        assert reproduce("explosion", "--output", tmp_path) == 1
    assert "wait for it or stop it, or give another --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no experiment is named; choose from"),
        (["explosions"], "'explosions' is no experiment; choose from"),
        (["explosion", "--data", "mnist.zip"], "explosion trains on no images"),
        (["scale_invariance", "--data", "imagenet=x"], "scale_invariance takes mnist"),
        (["all", "--data", "x"], "which of several"),
        (
            ["all", "--data", "cifra10=x"],
            "--data cifra10=x: none of these experiments has such a page: they take cifar10",
        ),
        (["explosion", "--markdown", "found"], "--markdown found has no suffix"),
        (["steps", "--data", f"imagenet={__file__}"], "takes days of a GPU for it; add --full, or give cifar10"),
        (["scale_invariance", "--data", "mnist="], "names no place"),
        (["explosion", "--output", __file__], "is a file; give a directory"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line_with_a_way_out(words, said, capsys):
    assert reproduce(*words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_images_that_are_not_there_are_said_before_anything_is_measured(tmp_path, capsys):
    """Also those of the last of several, hours before it would want them."""
    missing = tmp_path / "none"
    assert reproduce("scale_invariance", "--data", missing, "--output", tmp_path / "o") == 3
    assert f"--data mnist={missing} does not exist" in capsys.readouterr().err
    assert reproduce("explosion", "steps", "--data", f"cifar10={missing}", "--output", tmp_path / "o") == 3
    assert f"--data cifar10={missing} does not exist" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
