import json

import pytest
import torch

from pipeline import models
from pipeline.callbacks.journal import read_journal
from pipeline.cli import main
from pipeline.norm import SyncBatchNorm, population
from pipeline.training.averaging import Averaging
from pipeline.training.checkpoint import checkpoints
from pipeline.training.checkpoint_io import CheckpointError, weights_of
from tests.multiprocess.ranks import run_ranks
from tests.multiprocess.test_resume import config, final, train_rank


def walked(averaging: Averaging, steps: int) -> tuple[torch.nn.Linear, list[torch.Tensor]]:
    """A layer whose weights take so many values one after another, and these."""
    layer, draw, seen = torch.nn.Linear(3, 2), torch.Generator().manual_seed(0), []
    averaging.begin(layer)
    for step in range(1, steps + 1):
        with torch.no_grad():
            layer.weight.copy_(torch.randn(2, 3, generator=draw))
        averaging.update(layer, step)
        seen.append(layer.weight.detach().clone())
    return layer, seen


def test_the_average_is_exponential_from_its_start_on_every_so_many_steps():
    averaging = Averaging(0.3, every_steps=2, start_step=3)
    _, seen = walked(averaging, 9)
    expected = seen[1]  # of step 2, before the start
    for count, step in ((0, 4), (1, 6), (2, 8)):
        decay = min(0.3, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * seen[step - 1]
    torch.testing.assert_close(averaging.state["weight"], expected)


def test_the_first_updates_keep_little_so_that_a_short_run_is_no_average_of_its_beginning():
    decays = [Averaging(0.9999).decay_at(step) for step in (0, 1, 10, 1000, 10**6)]
    assert decays == [0.0, 2 / 11, 11 / 20, 1001 / 1010, 0.9999]


def test_an_applied_average_is_what_the_model_computes_with_and_its_weights_come_back():
    averaging = Averaging(0.5)
    layer, seen = walked(averaging, 5)
    average, x = averaging.state["weight"].clone(), torch.ones(1, 3)
    with averaging.applied(layer):
        torch.testing.assert_close(layer(x), x @ average.T + layer.bias)
    assert torch.equal(layer.weight, seen[-1])
    assert torch.equal(averaging.state["weight"], average)


def test_an_average_has_statistics_of_its_own_and_leaves_those_of_the_weights():
    torch.manual_seed(0)
    model = models.build("bn_inception", num_classes=3, norm=SyncBatchNorm, stem="small", width=0.125)
    averaging, batches = Averaging(0.5), [torch.randn(6, 3, 16, 16) for _ in range(3)]
    averaging.begin(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    own = {name: value.clone() for name, value in model.named_buffers()}
    with averaging.applied(model):
        population.estimate(model, batches)
        expected = {name: value.clone() for name, value in model.named_buffers()}
    assert all(torch.equal(value, own[name]) for name, value in model.named_buffers())
    assert all(torch.equal(averaging.state[name], value) for name, value in expected.items())
    assert any(not torch.equal(own[name], value) for name, value in expected.items())


def test_both_are_validated_the_average_is_chosen_by_and_evaluation_takes_it(shards, tmp_path):
    more = ("averaging.decay=0.8", "optimizer.rate=0.03", "trainer.max_epochs=2")
    averaged = config(shards, tmp_path, "averaged", 1, *more)
    run_ranks(1, train_rank, averaged, 0)
    plain = config(shards, tmp_path, "plain", 1, *more, "averaging.decay=0")
    run_ranks(1, train_rank, plain, 0)
    with_it, without = (read_journal(c.directory / "metrics.csv") for c in (averaged, plain))
    left, right = final(averaged.directory), final(plain.directory)
    assert all(torch.equal(value, right["state_dict"][name]) for name, value in left["state_dict"].items())
    for ours, theirs in zip(with_it, without, strict=True):  # nothing is trained otherwise
        if ours.split == "train":
            assert ours.loss == theirs.loss
        else:
            assert (ours.trained_loss, ours.trained_top1, ours.trained_top5) == (theirs.loss, theirs.top1, theirs.top5)
            assert ours.loss != theirs.loss
            assert theirs.trained_loss is None
    last = checkpoints(averaged.directory / "checkpoints")[-1]
    assert main(["evaluate", str(averaged.directory), "--checkpoint", str(last)]) == 0
    scores = json.loads((averaged.directory / "evaluation.json").read_text())
    assert (scores["loss"], scores["top1"]) == (pytest.approx(with_it[-1].loss, abs=1e-6), with_it[-1].top1)

    assert weights_of(left) is left["averaged"]
    assert weights_of(left, averaged=False) is left["state_dict"]
    assert weights_of(left).keys() == left["state_dict"].keys()
    assert weights_of(right) is right["state_dict"]
    with pytest.raises(CheckpointError, match=r"holds no averaged weights, as its run had averaging\.decay = 0"):
        weights_of(right, averaged=True)
