"""Figure 4: an ensemble of networks has a lower error than its members, and so have several views of an image.

    pipeline reproduce ensemble                          # scikit-learn's digits, 6 repetitions, 7 minutes on two cores
    pipeline reproduce ensemble --data shards/cifar10    # part of CIFAR-10, 8 minutes

Claim: averaged class probabilities of six networks based on BN-x30, over 144 views of an image each, lower the top-1
error on ImageNet from 25.2 % (one network, one view) over 21.99 % (one network) to 20.1 % (Ioffe & Szegedy 2015,
section 4.2.3, figure 4). The verdict asks whether the ensemble's error, with all views, lies below that of its
mean member and that of its best one. Which is best is seen on the images that it is scored on, which is in its favour.

By default three members, one of each kind that the paper names (larger initial weights; dropout; norms of single
activations), and 10 views; a repetition has other seeds for all of them, and the interval is over repetitions, on the
same validation images. Images are cut and mirrored in training as on ImageNet, digits too: corners and mirror images
would otherwise be nothing that a network has learned. The rate falls over this short training as it does over the
paper's six million steps, by 4 % in each of 112 periods.
A trial on digits with seeds that are not used here was looked at after four repetitions, which left the comparison with
the best member open (1.74 ± 1.74 points), and after five (2.06 ± 1.48). Six, with other seeds, were fixed after that:
they leave it open on digits (1.25 ± 1.94), and not on CIFAR-10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from pipeline.evaluation.ensemble import mean_of
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.results import PREDICTIONS
from pipeline.experiments.experiment import Experiment, Finding, Measured, Setting, Table
from pipeline.experiments.images import images
from pipeline.experiments.interval import Interval, band, interval, verdict
from pipeline.experiments.trainings import evaluated, trained
from pipeline.report.chart import Chart, percent

MEMBERS = {
    0: "larger initial weights", 1: "dropout 5 %", 2: "dropout 10 %", 3: "norms of single activations",
    4: "larger initial weights, dropout 5 %", 5: "norms of single activations, dropout 10 %",
}  # fmt: skip
SINGLE, MANY = "single", "views"
_SMALL, _FULL = (0, 1, 3), tuple(MEMBERS)
_VIEWS, _FULL_VIEWS = 10, 144
_DIGITS_STEPS, _STEPS, _BATCH, _PERIODS = 132, 250, 32, 112
_FIRST_SEED = 1_000  # of a repetition; the trial had those from 0
_TRAIN, _VAL = 2_000, 1_000  # images that are enough, of data sets that have more
_PAPER = {"one network, 1 view": "25.2 %", "one network, {0} views": "21.99 % (144 views)",
          "{1} networks, 1 view": "", "{1} networks, {0} views": "20.1 % (6 networks, 144 views)"}  # fmt: skip


def measure(setting: Setting) -> Measured:
    train, val = (0, 0) if setting.full else (_TRAIN, _VAL)
    of = images(setting, ("cifar10", "imagenet"), train=train, val=val)
    members, views = (_FULL, _FULL_VIEWS) if setting.full else (_SMALL, _VIEWS)
    epochs = max(1, round((_DIGITS_STEPS if of.name == "digits" else _STEPS) * _BATCH / of.train))
    short = [] if setting.full else [
        "data.image_size=16", f"data.global_batch_size={_BATCH}", "data.evaluation_crop=0.875", "augment.area_min=0.5",
        "augment.flip=true", "augment.photometric=none", f"trainer.max_epochs={epochs}",
        f"schedule.decay_epochs={epochs / _PERIODS:.6f}", "schedule.warmup_epochs=0", "trainer.validate_every_epochs=0",
        "norm.precise_images=512", "tracking.norms_every_steps=0", "tracking.system_every_seconds=0",
        "tracking.every_steps=100",
    ]  # fmt: skip
    wanted = {
        f"{repetition}-member-{member}": [
            f"recipe=bn_x30_member_{member}", *of.words, *short,
            f"seed={_FIRST_SEED + len(MEMBERS) * repetition + member}",
        ]
        for repetition in range(setting.seeds) for member in members
    }  # fmt: skip
    runs = trained(wanted, setting)
    whole = [
        repetition for repetition in range(setting.seeds)
        if not any(runs[f"{repetition}-member-{member}"].curve.diverged for member in members)
    ]  # fmt: skip
    places = {n: [runs[f"{n}-member-{member}"].run.directory for member in members] for n in whole}
    asked = {f"{n}-{name}": (places[n], count) for n in whole for name, count in ((SINGLE, 1), (MANY, views))}
    found = evaluated(asked, setting)
    return {
        "images": of.name, "val": of.val, "remarks": list(of.remarks), "members": list(members), "views": views,
        "steps": epochs * (of.train // _BATCH), "full": setting.full, "diverged": setting.seeds - len(whole),
        "repetitions": [{name: _scores(found[f"{n}-{name}"]) for name in (SINGLE, MANY)} for n in whole],
    }  # fmt: skip


def _scores(of: Measured) -> Measured:
    """Top-1 errors of members, of their ensemble, and of ensembles of fewer of them; the product's own difference."""
    members = [Predictions.load(Path(member["results"]) / PREDICTIONS) for member in of["members"]]
    return {
        "members": [member["top1_error"] for member in of["members"]],
        "ensemble": of["ensemble"]["top1_error"],
        "difference": [of["difference"]["top1"], *of["difference"]["top1_interval"]],
        "by_size": [smaller(members, size) for size in range(1, len(members) + 1)],
    }


def smaller(members: Sequence[Predictions], size: int) -> float:
    """Top-1 error of ensembles of so many of the members, mean over all that there are."""
    errors = [1 - float(mean_of(chosen).hits(1).mean()) for chosen in combinations(members, size)]
    return float(np.mean(errors))


def tell(measured: Measured) -> Finding:
    found: list[Measured] = measured["repetitions"]
    views, count = measured["views"], len(measured["members"])
    remarks = [*measured["remarks"], *_remarks(measured)]
    if not found:
        return Finding(None, "No repetition had members that all came to their end.", [], [], remarks)
    mean = {name: [float(np.mean(each[name]["members"])) for each in found] for name in (SINGLE, MANY)}
    best = {name: [min(each[name]["members"]) for each in found] for name in (SINGLE, MANY)}
    whole = {name: [each[name]["ensemble"] for each in found] for name in (SINGLE, MANY)}
    gains = {
        f"{views} views of one network": _gain(mean[SINGLE], mean[MANY]),
        f"{count} networks, 1 view, over their mean": _gain(mean[SINGLE], whole[SINGLE]),
        f"{count} networks, 1 view, over their best": _gain(best[SINGLE], whole[SINGLE]),
        f"{count} networks, {views} views, over their mean": _gain(mean[MANY], whole[MANY]),
        f"{count} networks, {views} views, over their best": _gain(best[MANY], whole[MANY]),
        "both over one network, 1 view": _gain(mean[SINGLE], whole[MANY]),
    }
    of_views, _, _, over_mean, over_best, _ = gains.values()
    moved = f"{'lower' if of_views.mean > 0 else 'raise'} the error by {_points(of_views, sign=False)}"
    return Finding(
        holds=verdict([over_mean, over_best]),
        said=f"With {views} views {count} networks together err on {np.mean(whole[MANY]):.1%} of the images, their "
        f"mean member on {np.mean(mean[MANY]):.1%} ({_points(over_mean)} points more) and their best on "
        f"{np.mean(best[MANY]):.1%} ({_points(over_best)} more). For one network {views} views instead of one {moved} "
        "points.",
        tables=[_errors(measured, mean, whole), _gains(gains), _repetitions(found, measured["members"], views)],
        figures=[_chart(found, views, measured["val"])],
        remarks=remarks,
    )


def _remarks(measured: Measured) -> list[str]:
    said = [] if measured["full"] else [
        f"Networks of a quarter of the width, images of 16 pixels, {measured['steps']:,} steps of {_BATCH}, "
        f"{len(measured['members'])} members and {measured['views']} views, unlike the paper's: gains may be compared "
        "with its own, errors not.",
    ]  # fmt: skip
    if measured["images"] == "digits":
        said.append("Digits are cut and mirrored here as photographs are, in training and in views, which makes them "
                    "harder to tell than they are.")  # fmt: skip
    if measured["diverged"]:
        said.append(f"{measured['diverged']} repetitions are left out: a member's loss was no number.")
    return said


def _gain(before: Sequence[float], after: Sequence[float]) -> Interval:
    return interval([a - b for a, b in zip(before, after, strict=True)])


def _points(of: Interval, *, sign: bool = True) -> str:
    return (of if sign or of.mean > 0 else Interval(-of.mean, of.half, of.n)).said(2, 100)


def _errors(measured: Measured, mean: Mapping[str, Sequence[float]], whole: Mapping[str, Sequence[float]]) -> Table:
    errors = (mean[SINGLE], mean[MANY], whole[SINGLE], whole[MANY])
    rows = [
        [name.format(measured["views"], len(measured["members"])), interval(values).said(2, 100, " %"), paper,
         str(len(values))]
        for (name, paper), values in zip(_PAPER.items(), errors, strict=True)
    ]  # fmt: skip
    return Table("Figure 4: top-1 error", ["", "here", "in the paper", "n"], rows,
                 "One network: the mean of the members. Mean and 95 % interval over repetitions, on the same "
                 f"{measured['val']:,} images; the paper's is one ensemble on the 50,000 of ImageNet.")  # fmt: skip


def _gains(gains: Mapping[str, Interval]) -> Table:
    rows = [[name, _points(gain), str(gain.n)] for name, gain in gains.items()]
    return Table("By how much the error falls, in points", ["", "fall", "n"], rows,
                 "Paired by repetition. The best member is chosen by the same images, which flatters it.")  # fmt: skip


def _repetitions(found: Sequence[Measured], members: Sequence[int], views: int) -> Table:
    rows = []
    for number, each in enumerate(found):
        value, low, high = (100 * part for part in each[MANY]["difference"])
        rows.append([str(number), *(f"{error:.2%}" for error in each[MANY]["members"]),
                     f"{each[MANY]['ensemble']:.2%}", f"{value:+.2f} ({low:+.2f} to {high:+.2f})"])  # fmt: skip
    head = ["repetition", *(MEMBERS[member] for member in members), "ensemble", "ensemble - best, in points"]
    return Table(f"Top-1 error of each repetition, {views} views", head, rows,
                 "The last interval is that of pipeline evaluate: a bootstrap over the images of one repetition."
                 )  # fmt: skip


def _chart(found: Sequence[Measured], views: int, val: int) -> Chart:
    lines = []
    for colour, (name, title) in enumerate(((SINGLE, "1 view"), (MANY, f"{views} views"))):
        at = [interval(column) for column in zip(*(each[name]["by_size"] for each in found), strict=True)]
        lines.append(band(title, np.arange(1.0, len(at) + 1), at, colour, bounds=(0.0, 1.0), dots=True))
    return Chart("ensemble-size", "Top-1 error of several networks together", "networks averaged", lines, percent,
                 legend=True, note=f"Mean over all ensembles of that size, 95 % interval over repetitions; "
                 f"{val:,} images.")  # fmt: skip


EXPERIMENT = Experiment(
    name="ensemble",
    title="Networks together err less than the best of them",
    claim="The averaged class probabilities of several batch-normalized networks, over several views of an image, have "
    "a lower error than the best of the networks over as many views: 20.1 % top-1 on ImageNet, one network 21.99 %.",
    source="Ioffe & Szegedy 2015, section 4.2.3, figure 4",
    minutes=8.0,
    seeds=6,
    full="the recipes' own size and length, six members, 144 views",
    measure=measure,
    tell=tell,
    data=("cifar10", "imagenet"),
    large=("imagenet",),
)
