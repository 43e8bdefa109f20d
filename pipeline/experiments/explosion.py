"""Gradients explode in deep fully connected networks with batch normalization, at initialization, by a known factor.

    pipeline reproduce explosion          # 20 seeds, 1 minute on two CPU cores

Claim: from layer to layer towards the input the squared norm of the gradient grows by pi / (pi - 1) = 1.467 for ReLU
and large batches, and by (B - 2) / (B - 3) without a nonlinearity (Yang, Pennington, Rao, Sohl-Dickstein &
Schoenholz 2019, arXiv 1902.08129). No variance of weights or biases removes it.
Expected at width 1024: ReLU 1.472 at B = 256 and 1.465 at 1024; linear 1.077 at B = 16, 1.016 at 64.

Legend: L layers, B images a batch, F features.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch

from pipeline.experiments.experiment import Experiment, Finding, Measured, Setting, Table
from pipeline.experiments.interval import Interval, band, interval
from pipeline.norm import SyncBatchNorm
from pipeline.report.chart import Chart, Line, power_of_ten, power_of_two

RELU_LIMIT = math.pi / (math.pi - 1)
WIDTH, LAYERS = 1024, 20
_FIRST, _LAST = 2, 5  # layers at either end, whose distribution has not settled
_BATCHES = {"relu": (16, 64, 256, 1024), "linear": (8, 16, 64, 256)}


def linear_ratio(batch: int) -> float:
    """(B - 2) / (B - 3). Raises ValueError where it has no value."""
    if batch <= 3:
        raise ValueError(f"batch = {batch}: the factor is finite for more than 3 images alone")
    return (batch - 2) / (batch - 3)


def growth(batch: int, activation: str | None, *, seed: int, width: int = WIDTH, layers: int = LAYERS) -> list[float]:
    """By how much the squared norm of the gradient grows at each layer, from that above it: L - 7 of them.

    x' = activation(BN(W x)), W ~ N(0, 1 / width), eps 0, a random gradient from above.
    """
    drawn = torch.Generator().manual_seed(seed)
    x_BF = torch.randn(batch, width, generator=drawn).requires_grad_()
    passed = [x_BF]
    norm = SyncBatchNorm(width, eps=0.0, affine=False, track_running_stats=False, activation=activation)
    for _ in range(layers):
        weight_FF = torch.randn(width, width, generator=drawn) / math.sqrt(width)
        x_BF = norm(x_BF @ weight_FF)
        x_BF.retain_grad()
        passed.append(x_BF)
    torch.autograd.backward(x_BF, torch.randn(batch, width, generator=drawn))
    squared = [float(x.grad.double().square().sum()) for x in passed if x.grad is not None]
    return [below / above for below, above in pairwise(squared)][_FIRST:-_LAST]


def measure(setting: Setting) -> Measured:
    found: dict[str, dict[str, list[list[float]]]] = {"relu": {}, "linear": {}}
    total, done = setting.seeds * sum(map(len, _BATCHES.values())), 0
    for kind, batches in _BATCHES.items():
        for batch in batches:
            rows = found[kind].setdefault(str(batch), [])
            for seed in range(setting.seeds):
                setting.progress(done, total, f"{kind}, {batch} images")
                rows.append(growth(batch, "relu" if kind == "relu" else None, seed=seed))
                done += 1
    return {"growth": found, "width": WIDTH, "layers": LAYERS}


def tell(measured: Measured) -> Finding:
    of = {kind: {int(batch): rows for batch, rows in by_batch.items()}
          for kind, by_batch in measured["growth"].items()}  # fmt: skip
    means = {kind: {batch: interval([float(np.mean(row)) for row in rows]) for batch, rows in by_batch.items()}
             for kind, by_batch in of.items()}  # fmt: skip
    off = [abs(means["relu"][batch].mean / RELU_LIMIT - 1) for batch in (256, 1024)]
    off_linear = [abs(means["linear"][batch].mean / linear_ratio(batch) - 1) for batch in (16, 64)]
    return Finding(
        holds=max(off) < 0.02 and max(off_linear) < 0.03,
        said=f"ReLU grows by {means['relu'][1024].said(4)} a layer at 1,024 images, {RELU_LIMIT:.4f} in theory; linear "
        f"by {means['linear'][64].said(4)} at 64, {linear_ratio(64):.4f} in theory.",
        tables=[_table(means)],
        figures=_figures(means, of["relu"]),
    )


def _table(means: dict[str, dict[int, Interval]]) -> Table:
    rows = []
    for kind, batches in means.items():
        for batch, mean in batches.items():
            theory = linear_ratio(batch) if kind == "linear" else RELU_LIMIT
            limit = "" if kind == "linear" else " (limit)"
            rows.append([f"{kind}, {batch:,} images", mean.said(4), f"{theory:.4f}{limit}",
                         f"{mean.mean / theory - 1:+.1%}", str(mean.n)])  # fmt: skip
    return Table(
        "Growth of the squared gradient norm, a layer", ["network", "measured", "theory", "off by", "n"], rows,
        f"Width {WIDTH:,}, {LAYERS} layers, of which the first {_FIRST} and the last {_LAST} are left out; mean over "
        "layers and seeds, 95 % interval over seeds.",
    )  # fmt: skip


def _figures(means: dict[str, dict[int, Interval]], by_layer: dict[int, list[list[float]]]) -> list[Chart]:
    layers = np.arange(1.0, LAYERS - _FIRST - _LAST + 1)
    grown = []
    for colour, (batch, rows) in enumerate(by_layer.items()):
        log_SL = np.cumsum(np.log10(np.array(rows)[:, ::-1]), axis=1)
        low, middle, high = np.quantile(log_SL, [0.025, 0.5, 0.975], axis=0)
        grown.append(Line(f"{batch:,} images", layers, middle, colour, low, high))
    theory = Line("pi / (pi - 1)", layers, layers * math.log10(RELU_LIMIT), 7)
    batches = np.array(_BATCHES["linear"], dtype=np.float64)
    linear = [means["linear"][int(batch)] for batch in batches]
    logs = np.log2(batches)
    return [
        Chart("explosion-relu", "ReLU: what has come together", "layers passed on the way down", [*grown, theory],
              power_of_ten, low=0.0, legend=True,
              note="Growth of the squared gradient norm: the median, and 95 % of the seeds."),
        Chart("explosion-linear", "Linear: growth a layer", "images a batch",
              [band("measured", logs, linear, 0, dots=True),
               Line("(B - 2) / (B - 3)", logs, np.array([linear_ratio(int(b)) for b in batches]), 7)],
              lambda value: f"{value:g}", low=1.0, legend=True, x_number=power_of_two),
    ]  # fmt: skip


EXPERIMENT = Experiment(
    name="explosion",
    title="Gradients explode at initialization",
    claim="In fully connected networks with batch normalization the squared gradient norm grows by pi / (pi - 1) = "
    "1.467 a layer for ReLU and large batches, and by (B - 2) / (B - 3) for linear ones.",
    source="Yang, Pennington, Rao, Sohl-Dickstein & Schoenholz 2019 (arXiv 1902.08129)",
    minutes=1.0,
    seeds=20,
    full="the same: the default is the whole of it",
    measure=measure,
    tell=tell,
)
