"""With few images on a rank local statistics cost accuracy; synchronized ones cost none. Why this product exists.

    pipeline reproduce small_batch                            # 3 seeds of 5 trainings, 7 minutes on two CPU cores
    pipeline reproduce small_batch --data shards/cifar10      # the same on 2,000 photographs of CIFAR-10, 9 minutes

Claim: where each of 8 GPUs normalizes its own 32, 16, 8, 4, 2 images, ResNet-50 on ImageNet errs in 23.6, 23.7, 24.8,
27.3, 34.7 % (Wu & He 2018, arXiv 1803.08494, figure 1); statistics over all ranks do not know how many there are.

Always a batch of 32, the same images in the same order at the same rate: only the number of images that share
statistics differs, and the accuracy knows of nothing else. So one process stands for the ranks: it takes its batch in
micro-batches of as many images (data.micro_batch_size), and adds up their gradients. That local statistics of ranks are
those of micro-batches, to the bit, and that those of groups and of all are those of their images together, to the
rounding of float64, is measured first, with 8 processes (ranks.py), and has a table; for whole trainings it is a law of
tests/multiprocess/test_law.py.
BN-x5 at a quarter of the channels, 12 pixels a side, 3 epochs at a rate of 0.02, at which digits were known to train
well with statistics of all 32 images; no other was tried. Validated once, at the end, with population statistics of 512
images (Algorithm 2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.experiments.curve import curve
from pipeline.experiments.experiment import Experiment, Finding, Measured, Setting, Table
from pipeline.experiments.images import TrainingImages, images
from pipeline.experiments.interval import Interval, band, interval
from pipeline.experiments.ranks import KINDS, PARTS, differences
from pipeline.experiments.trainings import trained
from pipeline.report.chart import Chart, Line, percent, power_of_two

_PAGES = ("cifar10", "imagenet")
BATCH = 32
ON_A_RANK = (32, 16, 8, 4, 2)
GROUP = 4  # ranks that share statistics, in the column between local and synchronized
_RANKS, _IMAGES = 8, 2  # that are compared with one process
_ROUNDING = 1e-12  # of float64, through 69 norms
_PUBLISHED = {32: 23.6, 16: 23.7, 8: 24.8, 4: 27.3, 2: 34.7}  # top-1 error, %
_TRAIN, _VAL = 2000, 1000


def measure(setting: Setting) -> Measured:
    shown = images(setting, _PAGES) if setting.full else images(setting, _PAGES, train=_TRAIN, val=_VAL)
    setting.progress(0, 0, f"{_RANKS} processes with {_IMAGES} images each")
    apart = differences(_RANKS, _IMAGES, (_RANKS, GROUP, 1))
    wanted = {f"of-{together}-{seed}": words(shown, together, seed, full=setting.full)
              for seed in range(setting.seeds) for together in sorted(ON_A_RANK)}  # fmt: skip
    runs = trained(wanted, setting)
    curves = {str(together): [runs[f"of-{together}-{seed}"].curve.measured() for seed in range(setting.seeds)]
              for together in ON_A_RANK}  # fmt: skip
    return {"curves": curves, "apart": {str(group): found for group, found in apart.items()}, "full": setting.full,
            "remarks": list(shown.remarks)}  # fmt: skip


def words(shown: TrainingImages, together: int, seed: int, *, full: bool) -> list[str]:
    """Of one training. together: images that share statistics."""
    said = ["recipe=bn_x5", *shown.words, f"seed={seed}", f"data.global_batch_size={BATCH}",
            f"data.micro_batch_size={together if together < BATCH else 0}", "trainer.checkpoint_every_minutes=0",
            "tracking.norms_every_steps=0", "tracking.system_every_seconds=0"]  # fmt: skip
    if full:
        return [*said, f"trainer.max_epochs={30 if shown.name == 'imagenet' else 60}"]
    photographs = [] if shown.name == "digits" else ["augment.area_min=0.6"]
    return [*said, *photographs, "augment.photometric=none", "model.width=0.25", "data.image_size=12",
            "data.evaluation_crop=1", "optimizer.rate=0.02", "schedule.warmup_epochs=0", "norm.precise_images=512",
            "trainer.max_epochs=3", "trainer.validate_every_epochs=0"]  # fmt: skip


def tell(measured: Measured) -> Finding:
    last = {int(together): [curve(each).last for each in runs] for together, runs in measured["curves"].items()}
    broken = sum(each["diverged"] for runs in measured["curves"].values() for each in runs)
    apart = {int(group): found for group, found in measured["apart"].items()}
    furthest = max(max(parts.values()) for parts in apart[_RANKS].values())
    few = min(ON_A_RANK)
    lost = _lost(last, few)
    holds = False if furthest > _ROUNDING or lost.high < 0 else True if lost.low > 0 else None
    diverged = [f"{broken} trainings ended in a loss that is no number; they count as 0."] if broken else []
    return Finding(
        holds=holds,
        said=f"With {few} images on a rank synchronized statistics reach {interval(last[BATCH]).said(1, 100, ' %')}, "
        f"local ones {interval(last[few]).said(1, 100, ' %')}: {lost.said(1, 100)} points apart, in pairs by seed. "
        f"{_RANKS} ranks with {_IMAGES} images each give what one process with {_RANKS * _IMAGES} gives, in float64 to "
        f"{furthest:.0e}.",
        tables=[_table(last), _exact(apart)],
        figures=_figures(last),
        remarks=[*measured["remarks"], _STAND_IN, *diverged],
    )


_STAND_IN = (
    "One process stands for the ranks: statistics of so many images are those of micro-batches of as many, to the bit "
    "for local ones (second table). Cells with as many images that share statistics are therefore one and the same "
    "training; what a rank more costs in time is another question (benchmarks.md)."
)


def _lost(last: Mapping[int, Sequence[float]], together: int) -> Interval:
    """What statistics of so many images lose against those of all, in pairs by seed."""
    return interval([whole - part for whole, part in zip(last[BATCH], last[together], strict=True)])


def _table(last: Mapping[int, Sequence[float]]) -> Table:
    rows = []
    for own in ON_A_RANK:
        reached = [interval(last[together]).said(1, 100, " %") for together in (own, min(BATCH, GROUP * own), BATCH)]
        gained = "" if own == BATCH else _lost(last, own).said(1, 100)
        rows.append([f"{own} on {BATCH // own}", *reached, gained, f"{_PUBLISHED[own]:.1f} %", str(len(last[own]))])
    return Table(
        f"Top-1 by the images on a rank, {BATCH} in all",
        ["images, ranks", "local", f"groups of {GROUP} ranks", "synchronized", "gained over local, points",
         "published error of local", "n"], rows,
        "Mean and 95 % interval over seeds; of what is gained, in pairs. Published: ResNet-50 on ImageNet, 8 GPUs (Wu "
        "& He 2018, quoted from memory).",
    )  # fmt: skip


def _exact(apart: Mapping[int, Mapping[str, Mapping[str, float]]]) -> Table:
    names = {_RANKS: "synchronized", GROUP: f"groups of {GROUP} ranks", 1: "local"}
    rows = [
        [f"{names[group]}, {'one layer' if kind == KINDS[0] else 'BN-Inception'}", str(group * _IMAGES),
         *("0" if not parts[part] else f"{parts[part]:.1e}" for part in PARTS)]
        for group, found in apart.items() for kind, parts in found.items()
    ]  # fmt: skip
    return Table(
        f"{_RANKS} processes with {_IMAGES} images each, against one process", ["statistics", "together", *PARTS], rows,
        "The largest difference of any value, in float64, forward and backward; 0 is to the bit.",
    )  # fmt: skip


def _figures(last: Mapping[int, Sequence[float]]) -> list[Chart]:
    ordered = sorted(ON_A_RANK)
    logs = np.array([math.log2(own) for own in ordered])
    local = [interval(last[own]) for own in ordered]
    grouped = [interval(last[min(BATCH, GROUP * own)]) for own in ordered]
    whole = [interval(last[BATCH])] * len(ordered)
    lost = [_lost(last, own) for own in ordered]
    published = np.array([(_PUBLISHED[own] - _PUBLISHED[BATCH]) / 100 for own in ordered])
    x = "images on a rank"
    return [
        Chart("small_batch-accuracy", "Accuracy by the images on a rank", x,
              [band("synchronized", logs, whole, 2, dots=True), band(f"groups of {GROUP}", logs, grouped, 4, dots=True),
               band("local", logs, local, 1, dots=True)],
              percent, legend=True, x_number=power_of_two, note="Mean over seeds with its 95 % interval."),
        Chart("small_batch-lost", "What local statistics lose", x,
              [band("here", logs, lost, 1, dots=True),
               Line("published, ResNet-50 on ImageNet", logs, published, 7, dots=True)],
              percent, legend=True, x_number=power_of_two, note="Points of top-1, against 32 images on a rank."),
    ]  # fmt: skip


EXPERIMENT = Experiment(
    name="small_batch",
    title="Few images on a rank",
    claim="With few images on a rank local statistics cost accuracy (11 points of ImageNet at 2 images), and "
    "synchronized statistics cost none: 8 ranks with 2 images are one with 16.",
    source="Wu & He 2018 (arXiv 1803.08494), figure 1; Peng et al. 2017 (arXiv 1711.07240)",
    minutes=9.5,
    seeds=3,
    full="30 epochs of ImageNet at 224 pixels and full width for each number of images, or 60 of all of CIFAR-10",
    measure=measure,
    tell=tell,
    data=_PAGES,
    large=("imagenet",),
)
