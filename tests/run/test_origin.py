"""A model card gives scores of the weights that it comes with, or none."""

import json

import pytest
import torch

from pipeline import cli
from pipeline.config import completed
from pipeline.run.origin import origin
from pipeline.training.checkpoint_io import write_checkpoint
from tests.export.runs import run_of

SMALL = ["model.stem=small", "model.width=0.125", "data.image_size=16"]
UNKNOWN = "not known; `pipeline evaluate` measures it"


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    """An evaluated run, with a row of step 7 in its metrics.csv."""
    config = run_of(shards, tmp_path_factory.mktemp("runs"), *SMALL)
    (config.directory / "metrics.csv").write_text(
        "step,epoch,split,loss,top1,top5,images\n7,1.0,val,1.0,0.77,0.99,35\n"
    )
    assert cli.main(["evaluate", str(config.directory)]) == 0
    return config


def checkpoint(config):
    return config.directory / "checkpoints" / "step-00000007.ckpt"


def said(config, path) -> str:
    return origin(config, path, torch.load(path, weights_only=True))["validation"]


def soup_of(config, scores=()):
    """Weights of no member, with the step of the newest, where `pipeline average` writes them."""
    content = torch.load(checkpoint(config), weights_only=True)
    content |= {"soup": {"members": ["first/step-5", "first/step-7"], "scores": list(scores)}}
    path = config.directory / "average.ckpt"
    write_checkpoint(content, path)
    return path


def row(network: str, top1: float):
    return {"network": network, "statistics": "estimated anew", "loss": 1.0, "top1": top1, "top5": 0.9, "images": 35}


def test_an_evaluation_counts_for_the_same_bytes_with_the_same_statistics_alone(run):
    found = json.loads((run.directory / "evaluation.json").read_text())
    scores = f"top-1 {found['top1']:.2%}, top-5 {found['top5']:.2%}"
    assert said(run, checkpoint(run)) == f"{scores} of 35 images, 1 view each"
    assert cli.main(["evaluate", str(run.directory), "norm.precise_images=0"]) == 0
    assert said(run, checkpoint(run)) == "top-1 77.00%, top-5 99.00% after step 7, by its metrics.csv"
    assert cli.main(["evaluate", str(run.directory)]) == 0


def test_averaged_weights_have_scores_of_their_own(run):
    rows = [row("first/step-5", 0.5), row("first/step-7", 0.6), row("average of 2", 0.7)]
    path = soup_of(run, [*rows, {**row("average of 2", 0.1), "statistics": "averages of the members'"}])
    assert said(run, path) == "top-1 70.00%, top-5 90.00% of 35 images, when it was averaged"
    assert said(run, soup_of(run)) == UNKNOWN
    assert cli.main(["evaluate", str(run.directory), "--checkpoint", str(path)]) == 0
    assert said(run, path).endswith("of 35 images, 1 view each")
    assert "by its metrics.csv" in said(run, checkpoint(run))
    assert cli.main(["evaluate", str(run.directory)]) == 0


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ({}, "running averages"),
        ({"soup": {"members": [], "scores": []}}, "population, as estimated when it was averaged"),
        ({"averaged": {}}, "population, as estimated on the average by its run's last validation"),
    ],
)
def test_statistics_that_are_not_estimated_are_called_what_the_file_holds(run, kind, said):
    content = torch.load(checkpoint(run), weights_only=True) | kind
    left = completed(run, norm={"precise_images": 0})
    assert origin(left, checkpoint(run), content)["statistics"] == said
    assert origin(run, checkpoint(run), content)["statistics"] == "population, 48 training images at most"


def test_of_a_file_from_elsewhere_the_run_knows_nothing(run, tmp_path):
    content = torch.load(checkpoint(run), weights_only=True)
    content["state_dict"]["model.classifier.bias"] += 1
    write_checkpoint(content, tmp_path / "other.ckpt")
    assert said(run, tmp_path / "other.ckpt") == UNKNOWN
