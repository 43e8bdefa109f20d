"""A run judged by other images, other labels and fewer classes, from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.cli.runs import of_run
from pipeline.cli.settling import settle, settled
from pipeline.data.evaluation_set import own_images
from pipeline.evaluation.predictions import Predictions
from pipeline.launch.plan import open_run
from pipeline.run.evaluating import Question, ask
from pipeline.training.checkpoint import newest
from tests.multiprocess.ranks import run_ranks
from tests.multiprocess.test_law import law_config, train_rank


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    """A run of a few steps on five classes."""
    directory = tmp_path_factory.mktemp("runs")
    config = open_run(
        settled(law_config(shards, directory, "run.id=a", "trainer.max_steps=3", f"data.cache={directory}/c"))
    )
    run_ranks(1, train_rank, config)
    return config.directory


def evaluated(capsys, run: Path, *options: str) -> dict:
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--json", *options]) == 0
    found: dict = json.loads(capsys.readouterr().out)
    return found


def test_the_same_images_as_class_folders_score_the_same(run, folders, tmp_path, capsys):
    own = evaluated(capsys, run)
    kept = (run / "evaluation.json").read_text()
    other = evaluated(capsys, run, "--set", str(folders))
    assert (other["top1"], other["images"]) == (own["top1"], 35)
    assert other["loss"] == pytest.approx(own["loss"], abs=1e-6)
    assert (run / "evaluation.json").read_text() == kept  # what the run is known by is its own


def test_folders_named_by_number_are_judged_by_the_labels_of_the_run(run, folders, tmp_path, capsys):
    for label in range(5):
        shutil.copytree(folders / "val" / f"class{label}", tmp_path / "v2" / str(label))
    own, other = evaluated(capsys, run), evaluated(capsys, run, "--set", str(tmp_path / "v2"))
    assert other["top1"] == own["top1"]
    assert other["results"] != own["results"]


def test_of_two_classes_alone_the_answer_is_one_of_them(run, folders, tmp_path, capsys):
    for label in (1, 3):
        shutil.copytree(folders / "val" / f"class{label}", tmp_path / "few" / f"class{label}")
    wide = evaluated(capsys, run, "--set", str(tmp_path / "few"))
    narrow = evaluated(capsys, run, "--set", str(tmp_path / "few"), "--within")
    assert wide["images"] == narrow["images"] == 14
    assert narrow["top1"] >= wide["top1"]
    assert narrow["top5"] == 1  # five answers among two
    predictions = Predictions.load(Path(wide["results"]) / "predictions.npz")
    both = predictions.probability_NK[:, [1, 3]]
    assert narrow["top1"] == pytest.approx((both.argmax(1) == (predictions.label_N == 3)).mean())


def test_labels_that_accept_more_score_more_and_leave_out_who_has_none(run, tmp_path, capsys):
    own = evaluated(capsys, run)
    predictions = Predictions.load(Path(own["results"]) / "predictions.npz")
    said = {key: [int(best)] for key, best in zip(predictions.key, predictions.probability_NK.argmax(1), strict=True)}
    said[predictions.key[0]] = []
    (tmp_path / "real.json").write_text(json.dumps(said))
    found = evaluated(capsys, run, "--labels", str(tmp_path / "real.json"))
    assert (found["top1"], found["images"]) == (1.0, 34)
    assert "loss" not in found
    assert Path(found["page"]).parent.name == "report-real"


def test_a_page_is_made_unless_it_is_not_wanted(run, capsys):
    assert Path(evaluated(capsys, run)["page"]).read_text().startswith("<!doctype html>")
    assert "page" not in evaluated(capsys, run, "--no-page")


def test_an_ensemble_is_judged_by_the_same_labels(run, shards, tmp_path, capsys):
    words = ["run.id=b", f"run.dir={tmp_path}", "seed=5", "trainer.max_steps=3"]
    other = open_run(settled(law_config(shards, tmp_path, *words)))
    run_ranks(1, train_rank, other)
    found = evaluated(capsys, run, str(other.directory), "--output", str(tmp_path / "both"))
    assert [m["images"] for m in found["members"]] == [35, 35]
    labels = {key: list(range(5)) for key in Predictions.load(tmp_path / "both" / "predictions.npz").key}
    (tmp_path / "all.json").write_text(json.dumps(labels))
    any_answer = evaluated(capsys, run, str(other.directory), "--labels", str(tmp_path / "all.json"), "--output",
                           str(tmp_path / "both"))  # fmt: skip
    assert any_answer["ensemble"]["top1_error"] == 0
    assert (tmp_path / "both" / "report-all" / "index.html").is_file()


@pytest.mark.parametrize(("options", "code", "said"), [
    (["--set", "nowhere"], 3, "source nowhere does not exist"),
    (["--labels", "nowhere.json"], 3, "nowhere.json: No such file"),
    (["--within"], 2, "--within is of the classes of --set"),
])  # fmt: skip
def test_what_is_not_there_is_told_in_a_line_before_anything_is_evaluated(run, capsys, options, code, said):
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), *options]) == code
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_no_run_is_a_line(capsys):
    assert cli.main(["evaluate", "data.bad_samples=0.1"]) == 2
    assert "no run is given, only data.bad_samples=0.1" in capsys.readouterr().err


def test_a_comparison_of_statistics_goes_on_from_what_is_evaluated(run, capsys):
    kept = Path(evaluated(capsys, run)["results"]) / "predictions.npz"
    before = kept.stat()
    found = evaluated(capsys, run, "norm.compare=true")
    assert kept.stat() == before
    assert found["running_averages"]["images"] == 35


def test_predictions_that_were_removed_are_made_again(run, capsys):
    own = evaluated(capsys, run)
    (Path(own["results"]) / "predictions.npz").unlink()
    assert evaluated(capsys, run)["top1"] == own["top1"]
    assert (Path(own["results"]) / "predictions.npz").is_file()


def test_what_is_complete_is_put_together_without_starting_processes(run, tmp_path, capsys, monkeypatch):
    """As where more images were bad than allowed, and the limit was raised."""
    own = evaluated(capsys, run, "--views", "10", "cluster.devices=2")
    directory = Path(own["results"])
    (directory / "evaluation.json").unlink()
    predictions = Predictions.load(directory / "predictions.npz")
    question = asked(run, "cluster.devices=2")
    results = question.results()
    each = question.images_each
    blocks = {b: len(range(b * each, min(35, (b + 1) * each))) for b in range(-(-35 // each))}
    results.add(blocks, predictions, [])
    (directory / "predictions.npz").unlink()
    monkeypatch.setattr("pipeline.cli.evaluate.launch_here", lambda *_: pytest.fail("processes were started"))
    assert evaluated(capsys, run, "--views", "10", "cluster.devices=2")["top1"] == own["top1"]


def asked(run: Path, *overrides: str) -> Question:
    config, dataset = settle(of_run(run / "config.yaml", overrides))
    checkpoint, _ = newest(run / "checkpoints")
    assert checkpoint is not None
    return ask(config, own_images(dataset, config.data.num_classes), checkpoint, 10)
