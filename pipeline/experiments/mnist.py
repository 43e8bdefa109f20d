"""Figure 1: a small sigmoid network learns sooner with batch normalization, and its activations stay where they are.

    pipeline reproduce mnist                      # scikit-learn's digits, 5 seeds, 5 minutes on two CPU cores
    pipeline reproduce mnist --data mnist.zip     # 12,000 images of MNIST: a zip of train/<digit>/ and test/<digit>/

Claim: on MNIST the 784-100-100-100-10 network with sigmoids reaches a higher accuracy, sooner, with batch
normalization, and the distribution of a last hidden unit's input is much more stable (Ioffe & Szegedy 2015, section
4.1, figure 1). The paper prints no numbers; it trains 50,000 steps of 60 images, which is --full.
Ours, where the paper is silent: plain SGD at 0.1 for both networks, weights of deviation 1 / sqrt(fan-in). Its input
is binary, ours is grey.
On MNIST that rate lets the network without norms catch up: after 5,000 steps of all its images (3 seeds) accuracies
were 95.6 ± 0.2 % without norms and 95.8 ± 0.3 % with them.

Stability, of which the paper shows a picture, is measured so: the percentiles of a unit's input, which are those of 60
images and noisy, are averaged over each tenth of the training. Its median moves by the range of these ten medians, in
units of their mean spread from the 15th to the 85th percentile; its spread changes by the largest over the smallest.
It is of one unit in a hundred, the middle one, chosen before anything was seen; the interval is over seeds, and pairs
the two networks of each.

Legend: S seeds, N networks, T looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.experiments.curve import Curve, curve, mean_line
from pipeline.experiments.experiment import Experiment, Finding, Measured, Setting, Table
from pipeline.experiments.images import images
from pipeline.experiments.interval import Interval, interval, verdict
from pipeline.experiments.trainings import Trained, trained
from pipeline.report.chart import Chart, Line, compact, percent
from pipeline.report.looks import read_percentiles
from pipeline.report.record import Values

PLAIN, NORMED = "mlp_sigmoid", "mlp_sigmoid_bn"  # recipes
NETWORKS = {PLAIN: "without", NORMED: "with normalization"}
SIDE, BATCH = 28, 60  # pixels, images a step
_STEPS, _FULL, _EPOCHS, _VALIDATIONS, _LOOKS = 2_400, 50_000, 5, 20, 200
_ENLARGED = f"They are enlarged to {SIDE}x{SIDE} pixels, so that the network is the paper's."
_PIXELS = "Pixels are grey; the paper's input is binary."
_LONGER = (
    "The difference at the end shrinks in a longer training: after 5,000 steps of all of MNIST, 3 seeds, accuracies "
    "were 95.6 ± 0.2 % without and 95.8 ± 0.3 % with normalization."
)
Pair = tuple[tuple[float, float], tuple[float, float]]  # what `movement` gives, without normalization and with it
_TRAIN, _VAL = 12_000, 2_000  # images that are enough
_PRECISE = 1_200  # images for the population statistics before each validation (Algorithm 2)
_PARTS = 10  # of a training, over which noisy percentiles are averaged


def measure(setting: Setting) -> Measured:
    train, val = (0, 0) if setting.full else (_TRAIN, _VAL)
    of = images(setting, ("mnist",), train=train, val=val)
    an_epoch = max(of.train // BATCH, 1)
    epochs = max(_EPOCHS, round((_FULL if setting.full else _STEPS) / an_epoch))
    steps = epochs * an_epoch
    wanted = {
        f"{recipe}-{seed}": [
            f"recipe={recipe}", *of.words, f"seed={seed}", f"data.image_size={SIDE}", "augment.area_min=1",
            f"data.global_batch_size={BATCH}", f"norm.precise_images={_PRECISE}", f"trainer.max_epochs={epochs}",
            f"trainer.validate_every_epochs={max(1, epochs // _VALIDATIONS)}",
            f"tracking.percentiles_every_steps={max(1, steps // _LOOKS)}", "tracking.gradients_every_steps=0",
            "tracking.norms_every_steps=0", "tracking.system_every_seconds=0", "tracking.every_steps=100",
        ]
        for recipe in NETWORKS for seed in range(setting.seeds)
    }  # fmt: skip
    runs = trained(wanted, setting)
    return {
        "images": of.name, "remarks": [*of.remarks, *([] if of.name == "mnist" else [_ENLARGED])], "steps": steps,
        "networks": {
            recipe: [_measured(runs[f"{recipe}-{seed}"]) for seed in range(setting.seeds)] for recipe in NETWORKS
        },
    }  # fmt: skip


def _measured(of: Trained) -> Measured:
    """Its curve, and steps with the percentiles 15, 50 and 85 of the middle unit of the last hidden layer."""
    unit = [values_T4 for (_, is_all), (_, values_T4) in read_percentiles(of.run.directory).items() if not is_all]
    return {"curve": of.curve.measured(), "percentiles": [[round(v, 4) for v in row] for row in unit[0].tolist()]
            if unit else []}  # fmt: skip


def movement(percentiles_T4: Values) -> tuple[float, float]:
    """How far the median moves, in spreads, and by what factor the spread changes: both are least for what stays.

    Raises ValueError for fewer looks than parts.
    """
    if len(percentiles_T4) < _PARTS:
        raise ValueError(f"{len(percentiles_T4)} looks have no {_PARTS} parts")
    parts = np.array([part.mean(axis=0) for part in np.array_split(percentiles_T4[:, 1:], _PARTS)])
    spread = np.maximum(parts[:, 2] - parts[:, 0], 1e-12)
    return float(np.ptp(parts[:, 1]) / spread.mean()), float(spread.max() / spread.min())


def tell(measured: Measured) -> Finding:
    runs: Mapping[str, list[Measured]] = measured["networks"]
    curves = {recipe: [curve(each["curve"]) for each in found] for recipe, found in runs.items()}
    moves = {recipe: [_movement(each) for each in found] for recipe, found in runs.items()}
    sooner, higher = (_paired([what(each) for each in curves[NORMED]], [what(each) for each in curves[PLAIN]])
                      for what in (_mean, lambda each: each.last))  # fmt: skip
    pairs = [
        (without, with_it)
        for without, with_it in zip(moves[PLAIN], moves[NORMED], strict=True)
        if without is not None and with_it is not None
    ]
    calmer = _calmer(pairs)
    return Finding(
        holds=verdict([sooner, higher, *calmer]) if calmer else None,
        said=_said(measured["steps"], sooner, higher, pairs),
        tables=[_accuracies(curves), *([_stability(pairs, calmer)] if pairs else [])],
        figures=[
            Chart("mnist-accuracy", "Figure 1 a: accuracy on held-out images", "optimizer steps",
                  [mean_line(NETWORKS[recipe], found, colour) for colour, (recipe, found) in enumerate(curves.items())],
                  percent, low=0.0, high=1.0, legend=True,
                  note="Mean and 95 % interval over seeds."),
            *_panels(runs),
        ],
        remarks=[*measured["remarks"], _PIXELS, *([_LONGER] if measured["images"] == "mnist" else [])],
    )  # fmt: skip


def _said(steps: int, sooner: Interval, higher: Interval, pairs: Sequence[Pair]) -> str:
    said = (f"After {steps:,} steps accuracy is {higher.said(1, 100)} points higher with normalization, over the whole "
            f"curve {sooner.said(1, 100)} points.")  # fmt: skip
    if not pairs:
        return said
    (moved, grown), (moved_with, grown_with) = np.mean(pairs, axis=0)
    return said + (
        f" The median of a last hidden unit's input moves by {moved:.2f} of its spread without and {moved_with:.2f} "
        f"with it, and the spread changes {grown:.1f}-fold and {grown_with:.1f}-fold."
    )


def _mean(of: Curve) -> float:
    """Of its validations: more for what learns sooner."""
    return float(of.top1_V.mean()) if len(of.top1_V) else 0.0


def _paired(more: Sequence[float], less: Sequence[float]) -> Interval:
    return interval([a - b for a, b in zip(more, less, strict=True)])


def _movement(of: Measured) -> tuple[float, float] | None:
    """None for a run that ended before there was anything to see."""
    percentiles_T4 = np.array(of["percentiles"], dtype=np.float64).reshape(-1, 4)
    return movement(percentiles_T4) if len(percentiles_T4) >= _PARTS and not of["curve"]["diverged"] else None


def _calmer(pairs: Sequence[Pair]) -> list[Interval]:
    """log2 of both measures without normalization over those with it; none without pairs."""
    log_SN2 = np.log2(np.maximum(np.array(pairs, dtype=np.float64).reshape(-1, 2, 2), 1e-12))
    return [interval((log_SN2[:, 0, place] - log_SN2[:, 1, place]).tolist()) for place in (0, 1)] if pairs else []


def _accuracies(curves: Mapping[str, Sequence[Curve]]) -> Table:
    """At three steps that all of them came to."""
    every = [each for found in curves.values() for each in found]
    count = min(len(each.top1_V) for each in every)
    places = sorted({count // 10, count // 2, count - 1}) if count else []
    rows = []
    for recipe, found in curves.items():
        at = [interval([float(each.top1_V[place]) for each in found]) for place in places]
        rows.append([NETWORKS[recipe], *(each.said(1, 100, " %") for each in at), str(len(found))])
    differences = [_paired(*([float(each.top1_V[place]) for each in curves[recipe]] for recipe in (NORMED, PLAIN)))
                   for place in places]  # fmt: skip
    rows.append(["difference, in points", *(each.said(1, 100) for each in differences), str(len(curves[PLAIN]))])
    head = ["network", *(f"top-1 at step {every[0].step_V[place]:,.0f}" for place in places), "n"]
    return Table("Accuracy on held-out images", head, rows, "Mean and 95 % interval over seeds, of differences paired.")


def _stability(pairs: Sequence[Pair], calmer: Sequence[Interval]) -> Table:
    rows = [
        [name, *(interval([pair[network][place] for pair in pairs]).said(2) for place in (0, 1)), str(len(pairs))]
        for network, name in enumerate(NETWORKS.values())
    ]
    rows.append(["log2 of without / with", *(each.said(2) for each in calmer), str(len(pairs))])
    return Table(
        "A last hidden unit's input over training", ["network", "its median moves by, in spreads",
                                                     "its spread changes by a factor of", "n"], rows,
        f"Of the middle unit, from one tenth of the training to another: range of {_PARTS} medians over their mean "
        "spread (15th to 85th percentile), and the largest spread over the smallest. Mean and 95 % interval over "
        "seeds, of ratios paired.",
    )  # fmt: skip


def _panels(runs: Mapping[str, Sequence[Measured]]) -> list[Chart]:
    """Figure 1 b and c, of the first seed, on one axis: what wanders is seen to."""
    seen = {recipe: np.array(found[0]["percentiles"], dtype=np.float64).reshape(-1, 4)
            for recipe, found in runs.items()}  # fmt: skip
    values = np.concatenate([each_T4[:, 1:].ravel() for each_T4 in seen.values()])
    low, high = (float(values.min()), float(values.max())) if len(values) else (None, None)
    charts = []
    for letter, (recipe, each_T4) in zip("bc", seen.items(), strict=True):
        step_T, low_T, middle_T, high_T = each_T4.T
        colour = list(NETWORKS).index(recipe)
        charts.append(Chart(
            f"mnist-{recipe}", f"Figure 1 {letter}: a last hidden unit's input, {NETWORKS[recipe]}", "optimizer steps",
            [Line("median", step_T, middle_T, colour, low_T, high_T), Line("15 %", step_T, low_T, colour),
             Line("85 %", step_T, high_T, colour)],
            compact, low=low, high=high, note="15th, 50th and 85th percentile over a batch of 60; the first seed.",
        ))  # fmt: skip
    return charts


EXPERIMENT = Experiment(
    name="mnist",
    title="A small network learns sooner, and its activations stay",
    claim="With batch normalization the 784-100-100-100-10 sigmoid network reaches a higher test accuracy, sooner, and "
    "the distribution of a hidden unit's input is more stable.",
    source="Ioffe & Szegedy 2015, section 4.1, figure 1",
    minutes=5.0,
    seeds=5,
    full="50,000 steps, as the paper's",
    measure=measure,
    tell=tell,
    data=("mnist",),
)
