"""Population statistics of a whole network against Algorithm 2 written out in numpy, in float64.

The reference shares nothing with the package: convolutions are loops, norms are the paper's formulas, and every layer
of a batch is normalized with the statistics of that batch, as in the training whose population is asked for.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.norm import PerActivationNorm, SyncBatchNorm
from pipeline.norm.population import estimate
from tests.multiprocess.ranks import run_ranks, with_group

Array = NDArray[np.float64]
EPS, SIDE, IMAGES, BATCHES = 1e-3, 4, 7, 5


class Weights(NamedTuple):
    conv1: Array  # (4, 3, 3, 3)
    conv2: Array  # (5, 4, 1, 1)
    gamma1: Array
    beta1: Array
    gamma2: Array
    beta2: Array


def weights() -> Weights:
    draw = np.random.default_rng(0).normal
    return Weights(draw(size=(4, 3, 3, 3)), draw(size=(5, 4, 1, 1)), draw(1, 0.3, 4), draw(size=4), draw(1, 0.3, 5),
                   draw(size=5))  # fmt: skip


def batches() -> list[Array]:
    """Of other offsets and scales each, so that the two forms differ."""
    draw = np.random.default_rng(1).normal
    return [draw(number, 1 + number, (IMAGES, 3, SIDE, SIDE)) for number in range(BATCHES)]


def convolved(x: Array, weight: Array) -> Array:
    """3x3 with a padding of 1, or 1x1, written as sums over the kernel."""
    margin = weight.shape[2] // 2
    padded = np.pad(x, ((0, 0), (0, 0), (margin, margin), (margin, margin)))
    y = np.zeros((len(x), len(weight), SIDE, SIDE))
    for row in range(weight.shape[2]):
        for column in range(weight.shape[3]):
            y += np.einsum("nchw,oc->nohw", padded[:, :, row : row + SIDE, column : column + SIDE],
                           weight[:, :, row, column])  # fmt: skip
    return y


def normalized(x: Array, gamma: Array, beta: Array) -> Array:
    mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    return gamma.reshape(1, -1, 1, 1) * (x - mean) / np.sqrt(variance + EPS) + beta.reshape(1, -1, 1, 1)


def inputs_of_norms(x: Array, w: Weights) -> tuple[Array, Array, Array]:
    """What each norm gets of a batch: two of channels, and the last of single activations."""
    first = convolved(x, w.conv1)
    second = convolved(np.maximum(normalized(first, w.gamma1, w.beta1), 0), w.conv2)
    third = np.maximum(normalized(second, w.gamma2, w.beta2), 0)
    return first, second, third


def reference(form: str) -> list[Array]:
    """Mean and variance of each norm: E[mu_B] and m/(m-1) E[s2_B], or the moments of all values of all batches."""
    found: list[Array] = []
    seen = [inputs_of_norms(x, weights()) for x in batches()]
    for number, axes in enumerate(((0, 2, 3), (0, 2, 3), (0,))):
        values = [each[number] for each in seen]
        if form == "aggregate":
            everything = np.concatenate(values)
            found += [everything.mean(axes), everything.var(axes)]
        else:
            m = values[0].size // (values[0].shape[1] * (SIDE * SIDE if len(axes) == 1 else 1))
            found += [
                np.mean([v.mean(axes) for v in values], 0),
                m / (m - 1) * np.mean([v.var(axes) for v in values], 0),
            ]
    return found


def network(group_size: int = 0) -> nn.Sequential:
    w = weights()
    made = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), SyncBatchNorm(4, group_size=group_size), nn.ReLU(),
        nn.Conv2d(4, 5, 1, bias=False), SyncBatchNorm(5, group_size=group_size), nn.ReLU(),
        PerActivationNorm((5, SIDE, SIDE), group_size=group_size),
    ).double()  # fmt: skip
    values = {"0.weight": w.conv1, "1.weight": w.gamma1, "1.bias": w.beta1, "3.weight": w.conv2, "4.weight": w.gamma2,
              "4.bias": w.beta2}  # fmt: skip
    made.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()}, strict=False)
    return made


def rank_of_estimate(rank, world, sizes, form):
    first = sum(sizes[:rank])
    made = network()
    with torch.no_grad():
        made(torch.from_numpy(batches()[0][first : first + sizes[rank]]))  # what was there before is forgotten
    assert estimate(made, [torch.from_numpy(x[first : first + sizes[rank]]) for x in batches()], form=form) == BATCHES
    found = []
    for norm in (made[1], made[4], made[6]):
        for vector in (norm.running_mean, norm.running_var):
            found.append((vector.view(SIDE, SIDE, 5).permute(2, 0, 1) if norm is made[6] else vector).numpy())
    return found


@pytest.mark.parametrize("form", ["batches", "aggregate"])
@pytest.mark.parametrize("sizes", [(7,), (4, 0, 3)])
def test_population_statistics_are_the_papers_on_any_ranks(sizes, form):
    expected = reference(form)
    for found in run_ranks(len(sizes), with_group, rank_of_estimate, sizes, form):
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_two_forms_differ_by_the_variance_between_batches():
    pairs = list(zip(reference("batches"), reference("aggregate"), strict=True))
    for ours, theirs in pairs[::2]:
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)  # one mean
    between = np.var([x.mean((0, 2, 3)) for x, _, _ in (inputs_of_norms(b, weights()) for b in batches())], axis=0)
    batch, whole = pairs[1]
    m = IMAGES * SIDE * SIDE
    np.testing.assert_allclose(whole, batch * (m - 1) / m + between, rtol=1e-12)
    assert (between > 0.1 * batch).any()  # which the test above would not confuse
