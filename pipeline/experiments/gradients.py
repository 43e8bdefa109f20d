"""Gradients layer by layer, with and without batch normalization, at initialization and in training.

    pipeline reproduce gradients                            # scikit-learn's digits, 3 minutes on two CPU cores
    pipeline reproduce gradients --data shards/cifar10      # photographs, 3 minutes

Claim: batch normalization makes gradients depend less on the scale of the weights and of their initial values, and
keeps saturating nonlinearities trainable (Ioffe & Szegedy 2015, sections 1 and 3.3): without it a layer's gradient
changes by orders of magnitude with the scale of initial weights, and with sigmoids also with depth.
Beside it, and no part of the verdict: rectifiers at He's scale, which was derived so that depth does not matter, and
tails, which Bjorck et al. 2018 (arXiv 1806.02375) found heavier at initialization without normalization.

At initialization: BN-Inception and the same without norms on one batch of images, for each seed; weights by He's rule,
and half and twice as large. In training: three seeds, both networks at the paper's rate for them, 0.0015. Looked at are
the 33 layers of the longest way through the network, whose last one is 33 nonlinearities behind the first.
Depth is measured as decades between the typical gradient (root mean square) of the layer with the largest and of the
one with the smallest; scale as decades by which that of a layer changes when all weights are made four times as large,
0.6 if it goes with their inverse, which is what normalization makes of it.

Legend: S seeds, L layers, B bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline import models
from pipeline.callbacks.histogram import histogram, weights
from pipeline.data.augment import CentreCrop
from pipeline.data.dataset import Location, open_dataset
from pipeline.data.images import Fault, open_images
from pipeline.experiments.experiment import Experiment, Finding, Measured, Setting, Table
from pipeline.experiments.images import TrainingImages, images
from pipeline.experiments.interval import Interval, band, interval, verdict
from pipeline.experiments.trainings import trained
from pipeline.norm import SyncBatchNorm
from pipeline.report.chart import Chart, Strip, power_of_ten
from pipeline.report.looks import A_DECADE, LOW, by_magnitude, read_gradients
from pipeline.report.record import Values


class Network(NamedTuple):
    """recipe: of its training, which is that of the paper's two baselines."""

    name: str
    model: str
    recipe: str
    activation: str


class _Size(NamedTuple):
    width: float
    side: int
    batch: int
    steps: int


NETWORKS = {
    "relu": Network("ReLU, without", "inception", "inception", "relu"),
    "relu_bn": Network("ReLU, with", "bn_inception", "bn_baseline", "relu"),
    "sigmoid": Network("sigmoid, without", "inception", "inception", "sigmoid"),
    "sigmoid_bn": Network("sigmoid, with", "bn_inception", "bn_baseline", "sigmoid"),
}
PAIRS = {"ReLU": ("relu", "relu_bn"), "sigmoid": ("sigmoid", "sigmoid_bn")}
GAINS = (0.5, 1.0, 2.0)  # of initial weights, on He's deviation
LAYERS = 33  # of the longest way
_SMALL, _FULL = _Size(0.25, 16, 32, 120), _Size(1.0, 32, 128, 2_000)
_TRAINED = 3  # seeds that are trained, at most
_LEAST = 1e-45  # float32's own: of a layer whose gradient has none above
_ON_THE_WAY = (".reduce33.", ".conv33a.", ".conv33b.")
_SHOWN = ("stem.0.", ".conv33b.")  # layers whose histograms are drawn: the first, and the last of each module


def measure(setting: Setting) -> Measured:
    of = images(setting, ("cifar10",))
    size = _FULL if setting.full else _SMALL
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as trainings do: layers this small are not worth the waiting of several for each other
    try:
        begun = _begun(of, size, setting)
    finally:
        torch.set_num_threads(threads)
    return {
        "images": of.name, "remarks": list(of.remarks), "steps": size.steps, "initial": begun,
        "trained": _trained(of, size, range(min(setting.seeds, _TRAINED)), setting),
    }  # fmt: skip


def _begun(of: TrainingImages, size: _Size, setting: Setting) -> dict[str, dict[str, list[Measured]]]:
    """Of each network and scale the first step's gradients, by seed."""
    begun: dict[str, dict[str, list[Measured]]] = {key: {str(gain): [] for gain in GAINS} for key in NETWORKS}
    for seed in range(setting.seeds):
        setting.progress(seed, setting.seeds, "networks at initialization")
        batch = _batch(of, size, seed, setting.device)
        for key, network in NETWORKS.items():
            for gain in GAINS:
                found = initial(network, batch, gain=gain, seed=seed, width=size.width)
                keeps = gain == 1 and seed == 0
                begun[key][str(gain)].append(found if keeps else {**found, "shares": {}})
    return begun


def _trained(of: TrainingImages, size: _Size, seeds: Sequence[int], setting: Setting) -> dict[str, list[Measured]]:
    """Of each network the last step's gradients."""
    wanted = {
        f"{key}-{seed}": [
            f"recipe={network.recipe}", *of.words, f"seed={seed}", f"model.activation={network.activation}",
            "model.dropout=0", "model.response_norm=false", f"model.width={size.width}", "model.stem=small",
            f"data.image_size={size.side}", f"data.global_batch_size={size.batch}", "data.evaluation_crop=1",
            "augment.photometric=none", "norm.precise_images=0", f"trainer.max_steps={size.steps}",
            f"trainer.max_epochs={size.steps}", "trainer.validate_every_epochs=0",
            f"tracking.gradients_every_steps={size.steps}", "tracking.norms_every_steps=0",
            "tracking.percentiles_every_steps=0", "tracking.system_every_seconds=0", "tracking.every_steps=100",
        ]
        for key, network in NETWORKS.items() for seed in seeds
    }  # fmt: skip
    found: dict[str, list[Measured]] = {key: [] for key in NETWORKS}
    for name, run in trained(wanted, setting).items():
        key, _, seed = name.rpartition("-")
        seen = read_gradients(run.run.directory)
        found[key].append(_looked_at(
            {layer: (each.deviation, each.kurtosis, each.share_B) for layer, each in seen.items()}, keeps=seed == "0",
        ))  # fmt: skip
    return found


def initial(
    network: Network, batch: tuple[Tensor, Tensor], *, gain: float, seed: int, width: float
) -> Measured:  # fmt: skip
    """What the first step's gradients are like, layer by layer."""
    x_NCHW, label_N = batch
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        norm = partial(SyncBatchNorm, eps=1e-3)
        built = models.build(network.model, num_classes=int(label_N.max()) + 1, norm=norm, width=width, stem="small",
                             activation=network.activation, initial_gain=gain).to(x_NCHW.device)  # fmt: skip
    torch.autograd.backward(torch.nn.functional.cross_entropy(built(x_NCHW).main_NK, label_N))
    seen = {}
    for name, weight in weights(built).items():
        assert weight.grad is not None
        found = histogram(weight.grad)
        seen[name] = (found.deviation, found.kurtosis, by_magnitude(found.counts_B.astype(np.float64)))
    return _looked_at(seen, keeps=True)


def _looked_at(seen: Mapping[str, tuple[float, float, Values]], *, keeps: bool) -> Measured:
    """Of the layers on the longest way: log10 of the deviation and of the kurtosis, and where asked shares by bin."""
    way = [name for name in seen if name.startswith("stem.") or any(part in f"{name}." for part in _ON_THE_WAY)]
    shown = [name for name in way if any(part in f"{name}." for part in _SHOWN)] if keeps else []
    return {
        "size": [math.log10(max(seen[name][0], _LEAST)) for name in way],
        "kurtosis": [math.log10(seen[name][1]) for name in way if math.isfinite(seen[name][1])],
        "shares": {name: [round(share, 5) for share in seen[name][2].tolist()] for name in shown},
    }


def _batch(of: TrainingImages, size: _Size, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Images of the training split (N, 3, H, W), standardized all together, and their labels."""
    dataset = open_dataset(Location(str(of.root)), say=lambda text: None)
    loader = open_images(dataset, "train", len(dataset.manifest.classes))
    crop = CentreCrop(size.side, 1.0)
    pixels, labels = [], []
    for sample in torch.randperm(of.train, generator=torch.Generator().manual_seed(seed)).tolist():
        loaded = loader.load(sample, crop.crop)
        if not isinstance(loaded, Fault):
            pixels.append(loaded)
            labels.append(int(loader.split.label_S[sample]))
        if len(pixels) == size.batch:
            break
    x_NCHW = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
    x_NCHW = (x_NCHW - x_NCHW.mean()) / x_NCHW.std()
    return x_NCHW.to(device), torch.tensor(labels, device=device)


def decades(of: Measured) -> float:
    """Between the layer with the largest and the one with the smallest gradients."""
    return float(np.ptp(of["size"]))


def response(by_gain: Mapping[str, Sequence[Measured]]) -> list[float]:
    """Decades by which a layer's gradients change from the smallest to the largest scale, mean over layers; S of them.

    Up and down count alike.
    """
    few, many = by_gain[str(GAINS[0])], by_gain[str(GAINS[-1])]
    return [float(np.abs(np.subtract(b["size"], a["size"])).mean()) for a, b in zip(few, many, strict=True)]


def tell(measured: Measured) -> Finding:
    initial, trained = measured["initial"], measured["trained"]
    depth = {key: [decades(each) for each in by_gain["1.0"]] for key, by_gain in initial.items()}
    later = {key: [decades(each) for each in found if each["size"]] for key, found in trained.items()}
    scale = {key: response(by_gain) for key, by_gain in initial.items()}
    claimed = [
        _paired(depth, "sigmoid"), _paired(later, "sigmoid"), _paired(scale, "sigmoid"), _paired(scale, "ReLU")
    ]  # fmt: skip
    known = [each for each in claimed if each is not None]
    return Finding(
        holds=verdict(known) if len(known) == len(claimed) else None,
        said=_said(depth, scale),
        tables=[_table(measured, depth, later, scale), _tails(initial, trained)],
        figures=[
            _by_layer("gradients-initial", "Typical gradient of each layer, at initialization",
                      {key: [each["size"] for each in by_gain["1.0"]] for key, by_gain in initial.items()}),
            _by_layer("gradients-trained", f"The same after {measured['steps']:,} steps",
                      {key: [each["size"] for each in found if each["size"]] for key, found in trained.items()}),
            _by_scale(initial),
            *_histograms("initial", "at initialization", {key: found["1.0"][0] for key, found in initial.items()}),
            *_histograms("trained", f"after {measured['steps']:,} steps",
                         {key: found[0] for key, found in trained.items()}),
        ],
        remarks=[*measured["remarks"], "The network is a quarter as wide as the paper's and sees images of 16 pixels, "
                 "unless --full was given; its depth is the paper's."],
    )  # fmt: skip


def _paired(of: Mapping[str, Sequence[float]], pair: str) -> Interval | None:
    """Without normalization minus with it; None where a run is missing."""
    without, with_it = (of[key] for key in PAIRS[pair])
    if not without or len(without) != len(with_it):
        return None
    return interval([a - b for a, b in zip(without, with_it, strict=True)])


def _said(depth: Mapping[str, Sequence[float]], scale: Mapping[str, Sequence[float]]) -> str:
    def means(of: Mapping[str, Sequence[float]], pair: str) -> tuple[str, str]:
        without, with_it = (f"{np.mean(of[key]):.1f}" for key in PAIRS[pair])
        return without, with_it

    sigmoid, he, relu_scale, sigmoid_scale = (
        means(of, pair) for of, pair in ((depth, "sigmoid"), (depth, "ReLU"), (scale, "ReLU"), (scale, "sigmoid"))
    )
    relu = _paired(depth, "ReLU")
    evens = ", where normalization evens nothing out" if relu is not None and relu.high < 0 else ""
    return (
        f"With sigmoids the gradients of {LAYERS} layers lie {sigmoid[0]} decades apart at initialization without "
        f"normalization and {sigmoid[1]} with it. Weights four times as large change a gradient by {relu_scale[0]} "
        f"decades without and {relu_scale[1]} with it (sigmoids: {sigmoid_scale[0]} and {sigmoid_scale[1]}). With "
        f"rectifiers at He's scale layers lie {he[0]} decades apart without and {he[1]} with it{evens}."
    )


def _table(
    measured: Measured, depth: Mapping[str, Sequence[float]], later: Mapping[str, Sequence[float]],
    scale: Mapping[str, Sequence[float]],
) -> Table:  # fmt: skip
    columns = (depth, later, scale)
    rows = [
        [network.name, *(interval(of[key]).said(2) if of[key] else "none" for of in columns),
         f"{len(depth[key])}, {len(later[key])}"]
        for key, network in NETWORKS.items()
    ]  # fmt: skip
    for pair in PAIRS:
        found = [_paired(of, pair) for of in columns]
        rows.append([f"{pair}, difference", *(each.said(2) if each else "none" for each in found), ""])
    return Table(
        "How far gradients lie apart, in decades",
        ["network", "over depth, at initialization", f"over depth, after {measured['steps']:,} steps",
         "by weights four times as large", "n"], rows,
        "Mean and 95 % interval over seeds, of differences paired; n at initialization, in training. Over depth: from "
        "the layer with the largest gradients to that with the smallest, of 33. By weights from half of He's deviation "
        "to twice it: change of a layer's gradient, mean over layers; 0.60 is a factor of four.",
    )  # fmt: skip


def _tails(
    initial: Mapping[str, Mapping[str, Sequence[Measured]]], trained: Mapping[str, Sequence[Measured]]
) -> Table:  # fmt: skip
    """Kurtosis as a geometric mean over layers: single layers have thousands."""

    def mean(found: Sequence[Measured]) -> list[float]:
        return [float(np.mean(each["kurtosis"])) for each in found if each["kurtosis"]]

    columns = [{key: mean(by_gain["1.0"]) for key, by_gain in initial.items()},
               {key: mean(found) for key, found in trained.items()}]  # fmt: skip
    rows = [
        [network.name, *(f"{10 ** float(np.mean(of[key])):.3g}" if of[key] else "none" for of in columns)]
        for key, network in NETWORKS.items()
    ]
    for pair in PAIRS:
        found = [_paired(of, pair) for of in columns]
        rows.append([f"{pair}, log10 of without / with", *(each.said(2) if each else "none" for each in found)])
    return Table(
        "Tails: kurtosis of a layer's gradient", ["network", "at initialization", "in training"], rows,
        "Geometric mean over layers and seeds; 3 is a Gaussian's. Bjorck et al. 2018 found heavier tails without "
        "normalization, in a residual network of 110 layers.",
    )  # fmt: skip


def _by_layer(key: str, title: str, sizes: Mapping[str, Sequence[Sequence[float]]]) -> Chart:
    lines = []
    for colour, (network, rows) in enumerate(sizes.items()):
        if rows:
            layers = np.arange(1.0, len(rows[0]) + 1)
            at = [interval(column) for column in zip(*rows, strict=True)]
            lines.append(band(NETWORKS[network].name, layers, at, colour))
    return Chart(key, title, "layers from the input", lines, power_of_ten, legend=True,
                 note="Root mean square of a layer's gradient; mean of its logarithm and 95 % interval over seeds."
                 )  # fmt: skip


def _by_scale(initial: Mapping[str, Mapping[str, Sequence[Measured]]]) -> Chart:
    lines = []
    for colour, (network, by_gain) in enumerate(initial.items()):
        middle = [float(np.mean(each["size"])) for each in by_gain["1.0"]]
        moved = [[float(np.mean(each["size"])) - at for each, at in zip(by_gain[str(gain)], middle, strict=True)]
                 for gain in GAINS]  # fmt: skip
        at = [interval(column) for column in moved]
        lines.append(band(NETWORKS[network].name, np.log2(np.array(GAINS)), at, colour))
    return Chart("gradients-scale", "What the scale of initial weights makes of them", "scale, in He's",
                 lines, power_of_ten, legend=True, x_number=lambda log: f"{2**log:.2g}",
                 note="Geometric mean over layers, against that at He's scale."
                 )  # fmt: skip


def _histograms(key: str, when: str, seen: Mapping[str, Measured]) -> list[Strip]:
    """A row of bins for each layer, on one axis for all networks: what vanishes moves to the left."""
    there = [np.array(share) for each in seen.values() for share in each["shares"].values()]
    if not there:
        return []
    filled = np.flatnonzero(np.max(there, axis=0) > 0)
    first, last = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 1)
    edge_E = LOW + np.arange(first, last + 1) / A_DECADE
    return [
        Strip(f"gradients-{key}-{network}", f"{NETWORKS[network].name}, {when}", "log10 |gradient|",
              [_place(name) for name in each["shares"]],
              [list(zip(edge_E[:-1].tolist(), edge_E[1:].tolist(), share[first:last], strict=True))
               for share in each["shares"].values()],
              full=float(np.max(there)), note="Histogram of each layer's gradient, the input above; the first seed. "
              f"Below 10^{LOW} there is no bin.")
        for network, each in seen.items()
    ]  # fmt: skip


def _place(layer: str) -> str:
    """body.3a.conv33b.conv as 3a."""
    return "stem" if layer.startswith("stem.") else layer.split(".")[1]


EXPERIMENT = Experiment(
    name="gradients",
    title="Gradients that depend on neither depth nor scale",
    claim="Without batch normalization a layer's gradient changes by orders of magnitude with the scale of initial "
    "weights, and with sigmoids also with depth; with it, it does far less.",
    source="Ioffe & Szegedy 2015, sections 1 and 3.3",
    minutes=3.0,
    seeds=20,
    full="the whole width, images of 32 pixels, 2,000 steps",
    measure=measure,
    tell=tell,
    data=("cifar10",),
)
