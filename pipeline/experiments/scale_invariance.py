"""The scale of the weights under a norm means nothing to its output, and divides their gradient.

    pipeline reproduce scale_invariance     # 20 seeds of the identities, 3 of the trainings; 4 minutes on two CPU cores

Claim: for a > 0, BN((aW)u) = BN(Wu); its derivative by u is the same; that by the weights is 1/a of it, so that larger
weights get smaller steps and stop growing (Ioffe & Szegedy 2015, section 3.3). All of it is exact at eps = 0, where
the gradient is also orthogonal to the weights. And: at five times its learning rate the network without norms does
not train any more, that with them does (section 4.2.1).

The rates are a ladder, each five times the one below, and its edge is found, not given. Of two ladders that were tried
on digits this is the one whose edge falls between two rungs: at 0.1, on the other, one of three seeds without norms
trained badly. The network is the small one of section 4.1 with rectifiers, which trains in seconds; `steps` has
Inception at five times its rate.

Legend: N images, D inputs, C channels, A scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.experiments.curve import Curve, curve
from pipeline.experiments.experiment import Experiment, Finding, Measured, Setting, Table
from pipeline.experiments.images import images
from pipeline.experiments.interval import Interval, band, interval
from pipeline.experiments.trainings import trained
from pipeline.norm import SyncBatchNorm
from pipeline.report.chart import Chart, Line, percent, power_of_ten

SCALES = (0.01, 0.1, 10.0, 1000.0)
LAWS = ("BN((aW)u) = BN(Wu)", "dBN((aW)u)/du = dBN(Wu)/du", "a dBN((aW)u)/d(aW) = dBN(Wu)/dW", "<W, dL/dW> = 0")
BOUND = 1e-10  # of rounding in float64
RATES = (0.012, 0.06, 0.3, 1.5)
_NETWORKS = {"mlp": "without norms", "bn_mlp": "with norms"}
_CURVE_SCALES = tuple(10.0 ** (exponent / 2) for exponent in range(-6, 7))
_EPSILONS = {"eps = 0": 0.0, "eps = 0.001": 1e-3}
_TRAININGS, _STEPS, _FULL_STEPS, _BATCH = 3, 528, 10_000, 32
_TRAINS = 0.5  # top-1 of ten classes that are equally frequent

Layer = Callable[[Tensor, Tensor], Tensor]


def deviations(a: float, *, seed: int, convolution: bool = False) -> list[float]:
    """How far each of LAWS is off at eps = 0, relative to the largest value of what it is about, in float64."""
    layer, u, weight = _layer(seed, convolution=convolution)
    y, d_u, d_weight = _passed(layer, u, weight, 0.0, seed)
    scaled_y, scaled_d_u, scaled_d_weight = _passed(layer, u, a * weight, 0.0, seed)
    along = (weight * d_weight).flatten(1).sum(1).abs()
    size = weight.flatten(1).norm(dim=1) * d_weight.flatten(1).norm(dim=1)
    return [_off(scaled_y, y), _off(scaled_d_u, d_u), _off(a * scaled_d_weight, d_weight),
            float((along / size).max())]  # fmt: skip


def gradient_size(a: float, eps: float, *, seed: int) -> float:
    """Norm of the gradient of a linear layer's weights at a times their scale, in that at once."""
    layer, u, weight = _layer(seed, convolution=False)
    at_one = _passed(layer, u, weight, eps, seed)[2]
    return float(_passed(layer, u, a * weight, eps, seed)[2].norm() / at_one.norm())


def _layer(seed: int, *, convolution: bool) -> tuple[Layer, Tensor, Tensor]:
    """An input and the weights of a layer under a norm, whose outputs have a variance of about one."""
    drawn = torch.Generator().manual_seed(seed)
    shape, weights = ((8, 5, 6, 6), (7, 5, 3, 3)) if convolution else ((32, 20), (10, 20))
    u = torch.randn(shape, generator=drawn, dtype=torch.float64)
    weight = torch.randn(weights, generator=drawn, dtype=torch.float64) / math.sqrt(math.prod(weights[1:]))
    return nn.functional.conv2d if convolution else nn.functional.linear, u, weight


def _passed(layer: Layer, u: Tensor, weight: Tensor, eps: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The norm's output, and the gradients of u and the weight for a random one from above."""
    u, weight = u.clone().requires_grad_(), weight.clone().requires_grad_()
    x = layer(u, weight)
    y = SyncBatchNorm(x.shape[1], eps=eps, track_running_stats=False).double()(x)
    above = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    d_u, d_weight = torch.autograd.grad(y, (u, weight), above)
    return y.detach(), d_u, d_weight


def _off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def measure(setting: Setting) -> Measured:
    seeds = range(setting.seeds)
    exact = {kind: {str(a): [deviations(a, seed=seed, convolution=kind == "convolution") for seed in seeds]
                    for a in SCALES} for kind in ("linear", "convolution")}  # fmt: skip
    sizes = {name: [[gradient_size(a, eps, seed=seed) for a in _CURVE_SCALES] for seed in seeds]
             for name, eps in _EPSILONS.items()}  # fmt: skip
    of = images(setting, _DATA)
    epochs = max(1, round((_FULL_STEPS if setting.full else _STEPS) * _BATCH / of.train))
    places = [(network, rate, seed) for network in _NETWORKS for rate in RATES
              for seed in range(min(setting.seeds, _TRAININGS))]  # fmt: skip
    wanted = {
        f"{network}-{rate:g}-{seed}": [
            "recipe=mlp_sigmoid", *of.words, f"model.name={network}", "model.activation=relu", f"seed={seed}",
            f"optimizer.rate={rate}", f"data.global_batch_size={_BATCH}", f"optimizer.rate_batch_size={_BATCH}",
            "optimizer.momentum=0.9", "augment.area_min=1", f"trainer.max_epochs={epochs}",
            f"trainer.validate_every_epochs={max(1, epochs // 4)}", "norm.precise_images=1024",
            "tracking.percentiles_every_steps=0", "tracking.gradients_every_steps=0", "tracking.norms_every_steps=0",
        ]
        for network, rate, seed in places
    }  # fmt: skip
    found = trained(wanted, setting)
    runs = [{"network": network, "rate": rate, "seed": seed, **found[f"{network}-{rate:g}-{seed}"].curve.measured()}
            for network, rate, seed in places]  # fmt: skip
    return {"images": of.name, "remarks": list(of.remarks), "deviations": exact, "scales": list(_CURVE_SCALES),
            "gradient_size": sizes, "trainings": runs}  # fmt: skip


def tell(measured: Measured) -> Finding:
    worst = max(float(np.max(rows)) for by_scale in measured["deviations"].values() for rows in by_scale.values())
    runs = _by_rate(measured)
    edge = max((rate for rate, found in runs["mlp"].items() if _all_train(found)), default=math.nan)
    beyond = 5 * edge
    plain, normed = (runs[network].get(beyond, []) for network in _NETWORKS)
    falls = bool(plain) and not any(each.last >= _TRAINS for each in plain)
    stays = bool(normed) and _all_train(normed)
    identities = f"The identities hold to {worst:.0e} at eps = 0"
    if not math.isfinite(edge):
        said, holds = f"{identities}; the network without norms trains at none of the rates.", None
    elif not plain:
        said, holds = f"{identities}; the network without norms trains at every rate up to {edge:g}.", None
    else:
        ends = [interval([each.last for each in found]) for found in (plain, normed)]
        said = (
            f"{identities}. Without norms the highest rate that trains is {edge:g}; at {beyond:g} that network ends at "
            f"{ends[0].said(1, 100, ' %')}, and with norms at {ends[1].said(1, 100, ' %')}."
        )
        holds = worst < BOUND and falls and stays
    if worst >= BOUND:
        holds = False
    return Finding(
        holds=holds, said=said, tables=[_identities(measured), _rates(runs)],
        figures=[_ladder(runs), _sizes(measured)],
        remarks=[*measured["remarks"], "The network of the ladder is 784-100-100-100-10 with rectifiers, where the "
                 "paper's is Inception: `steps` has that."],
    )  # fmt: skip


def _all_train(found: Sequence[Curve]) -> bool:
    return all(each.last >= _TRAINS for each in found)


def _by_rate(measured: Measured) -> dict[str, dict[float, list[Curve]]]:
    found: dict[str, dict[float, list[Curve]]] = {network: {} for network in _NETWORKS}
    for each in measured["trainings"]:
        found[each["network"]].setdefault(each["rate"], []).append(curve(each))
    return found


def _identities(measured: Measured) -> Table:
    rows = []
    for kind, by_scale in measured["deviations"].items():
        for a, values in by_scale.items():
            largest = np.max(np.array(values), axis=0)
            rows.append([f"{kind}, a = {float(a):g}", *(f"{value:.0e}" for value in largest), str(len(values))])
    return Table("How far the identities are off at eps = 0", ["layer", *LAWS, "n"], rows,
                 "Largest deviation of any value over all seeds, in the largest value; float64, whose rounding is "
                 "1e-16.")  # fmt: skip


def _rates(runs: dict[str, dict[float, list[Curve]]]) -> Table:
    rows = [
        [f"{rate:g}", *(_ended(runs[network].get(rate, [])) for network in _NETWORKS),
         str(len(runs["mlp"].get(rate, [])))]
        for rate in sorted(runs["mlp"])
    ]  # fmt: skip
    return Table("Top-1 at the end, by learning rate", ["rate", *_NETWORKS.values(), "n"], rows,
                 "Mean and 95 % interval over seeds; a training whose numbers were none any more counts as 0 %.",
                 )  # fmt: skip


def _ended(found: Sequence[Curve]) -> str:
    if not found:
        return "not run"
    diverged = sum(each.diverged for each in found)
    if diverged == len(found):
        return "diverges"
    said = _bounded(found).said(1, 100, " %")
    return f"{said}, {diverged} diverge" if diverged else said


def _bounded(found: Sequence[Curve]) -> Interval:
    return interval([each.last for each in found])


def _ladder(runs: dict[str, dict[float, list[Curve]]]) -> Chart:
    lines, ladder = [], sorted({rate for by_rate in runs.values() for rate in by_rate})
    for colour, (network, name) in enumerate(_NETWORKS.items()):
        rates = [rate for rate in ladder if rate in runs[network]]
        ends = [_bounded(runs[network][rate]) for rate in rates]
        rungs = np.array([float(ladder.index(rate)) for rate in rates])
        lines.append(band(name, rungs, ends, 1 - colour, bounds=(0.0, 1.0), dots=True))
    return Chart("scale_invariance-rates", "Top-1 at the end", "learning rate", lines, percent, low=0.0, high=1.0,
                 legend=True, x_number=lambda rung: f"{ladder[int(rung)]:g}" if rung in range(len(ladder)) else "",
                 )  # fmt: skip


def _sizes(measured: Measured) -> Chart:
    log_A = np.log10(np.array(measured["scales"]))
    lines = []
    for colour, (name, sizes) in enumerate(measured["gradient_size"].items()):
        log_SA = np.log10(np.array(sizes))
        lines.append(Line(name, log_A, log_SA.mean(0), colour, log_SA.min(0), log_SA.max(0)))
    law = Line("1 / a", log_A, -log_A, 7)
    return Chart("scale_invariance-gradient", "Size of the weights' gradient", "a, the scale of the weights",
                 [law, *lines], power_of_ten, legend=True, x_number=power_of_ten,
                 note="In that at a = 1; mean and range over seeds. With eps > 0 weights too small for it leave the "
                 "law.")  # fmt: skip


_DATA = ("mnist",)
EXPERIMENT = Experiment(
    name="scale_invariance",
    title="The scale of the weights does not matter, and rates may be higher",
    claim="Under a norm the scale of the weights changes neither the output nor the gradient that is handed down, and "
    "divides the gradient of the weights; at five times its learning rate a network without norms fails, one with them "
    "trains.",
    source="Ioffe & Szegedy 2015, sections 3.3 and 4.2.1",
    minutes=4.0,
    seeds=20,
    full=f"{_FULL_STEPS:,} steps a training",
    measure=measure,
    tell=tell,
    data=_DATA,
)
