"""A page about one evaluation: what is right, what is taken for what, and whether confidence is earned.

Legend: N images, K classes, B bins of confidence, X points of a curve.
"""

from __future__ import annotations

import csv
import io
import math
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shards import write_atomically
from pipeline.evaluation.quality import (
    Calibration,
    ClassScore,
    Confusion,
    accuracy_by_coverage,
    answers,
    by_class,
    calibration,
    confusions,
    hits,
)
from pipeline.evaluation.truth import Truth
from pipeline.report.chart import Chart, Figure, Line, percent
from pipeline.report.document import charts, document
from pipeline.report.markup import Cell, Html, cards, table, tag
from pipeline.report.words import fraction

PAGE, CLASSES = "index.html", "classes.csv"
_WORST, _PAIRS, _MISTAKES = 12, 20, 24


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What was evaluated. facts: for the head of the page, name and value. names: of the classes, by label.

    keys: of the images. members: rows of a table, one a network, under their heads; none for a single network.
    notes: what else is to be known.
    picture: a small JPEG or PNG of an image by its place here, or None where there is none.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    names: Sequence[str]
    keys: Sequence[str]
    truth: Truth
    probability_NK: NDArray[np.floating]
    members: tuple[Sequence[str], Sequence[Sequence[str]]] = ((), ())
    notes: Sequence[str] = ()
    picture: Callable[[int], bytes | None] = lambda place: None


def make_evaluation_page(evaluated: Evaluated, output: Path, *, command: str, now: datetime) -> Path:
    """Write the page, and a table of all classes beside it; returns the page."""
    scores = by_class(evaluated.probability_NK, evaluated.truth)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / CLASSES, _classes_csv(evaluated, scores).encode())
    write_atomically(output / PAGE, evaluation_page(evaluated, scores, command=command, now=now).encode())
    return output / PAGE


def evaluation_page(evaluated: Evaluated, scores: Sequence[ClassScore], *, command: str, now: datetime) -> str:
    """scores: those of all classes."""
    found = confusions(evaluated.probability_NK, evaluated.truth)
    measured = calibration(evaluated.probability_NK, evaluated.truth)
    left_out = len(evaluated.truth.label_N) - int(evaluated.truth.counted_N.sum())
    remarks = [f"{left_out:,} images have no right answer by these labels, and do not count"] if left_out else []
    heads, rows = evaluated.members
    body: list[Html] = [
        tag("h1", evaluated.title),
        tag("p", f"An evaluation by pipeline · {now.astimezone(UTC):%Y-%m-%d %H:%M} UTC", kind="soft"),
        *(tag("p", remark, kind="warn") for remark in remarks),
        *(tag("p", note, kind="soft") for note in evaluated.notes),
        cards([*evaluated.facts, *_measures(measured)]),
    ]
    if rows:
        body += [tag("h2", "Networks"), table(heads, rows, numbers=range(1, len(heads)))]
    body += [tag("h2", "Confidence and classes"), charts(_figures(evaluated, scores, measured))]
    failing = [score for score in scores if score.right < score.images]
    worst = sorted(failing, key=lambda s: (s.recall, -s.images))[:_WORST]
    if worst:
        body += [tag("h2", "The classes that fail most"), _worst_classes(evaluated, worst, found)]
        body += [_matrix(evaluated, worst, found)]
    body += [tag("h2", "What is taken for what"), _pairs(evaluated, found)]
    body += [tag("h2", "The most confident mistakes"), _mistakes(evaluated)]
    body += [_all_classes(evaluated, scores)]
    return document(evaluated.title, body, command)


def _measures(measured: Calibration) -> list[tuple[str, str]]:
    return [
        ("calibration error (ECE)", fraction(measured.error)),
        ("of the worst bin", fraction(measured.largest)),
        ("loss", f"{measured.nll:.4g}"),
        ("Brier score", f"{measured.brier:.4g}"),
    ]


def _figures(evaluated: Evaluated, scores: Sequence[ClassScore], measured: Calibration) -> list[Figure]:
    ends = np.array([0.0, 100.0])
    bins = len(measured.images_B)
    edges = np.repeat(np.linspace(0, 100, bins + 1), 2)[1:-1]
    share_B = measured.images_B / max(int(measured.images_B.sum()), 1)
    kept_X, accuracy_X = accuracy_by_coverage(evaluated.probability_NK, evaluated.truth)
    recall_K = np.sort([score.recall for score in scores if score.images])
    mean = float(recall_K.mean()) if len(recall_K) else math.nan
    return [
        Chart("reliability", "Is confidence earned?", "confidence, %",
              [Line("accuracy", 100 * measured.confidence_B, measured.accuracy_B, 0, dots=True),
               Line("if it were", ends, ends / 100, 7)], percent, low=0.0, high=1.0, legend=True,
              note=f"Mean confidence and accuracy in {bins} bins; below the grey line answers are too confident."),
        Chart("confidence", "How confident it is", "confidence, %",
              [Line("images", edges, np.repeat(share_B, 2), 0, low=np.zeros(2 * bins), high=np.repeat(share_B, 2))],
              percent, low=0.0, note="Share of the images in each bin."),
        Chart("coverage", "What abstaining would gain", "images answered, the most confident first, %",
              [Line("accuracy", 100 * kept_X, accuracy_X, 0)], percent),
        Chart("recall", "Classes from the worst to the best", "classes",
              [Line("right", np.arange(1.0, len(recall_K) + 1), recall_K, 0)], percent, low=0.0, high=1.0,
              rules=[(mean, "mean")] if math.isfinite(mean) else [], note="Images of each class that are right."),
    ]  # fmt: skip


def _name(evaluated: Evaluated, label: int) -> str:
    return evaluated.names[label] if label < len(evaluated.names) else str(label)


def _worst_classes(evaluated: Evaluated, worst: Sequence[ClassScore], found: Sequence[Confusion]) -> Html:
    rows: list[list[Cell]] = []
    for score in worst:
        taken = [f"{_name(evaluated, c.taken_for)} ({c.images})" for c in found if c.label == score.label][:3]
        rows.append([_name(evaluated, score.label), f"{score.images:,}", fraction(score.recall),
                     fraction(score.right_of_five / score.images), fraction(score.precision),
                     ", ".join(taken) or "–"])  # fmt: skip
    return table(["class", "images", "right", "right of five", "right when answered", "taken for"], rows, range(1, 5))


def _matrix(evaluated: Evaluated, worst: Sequence[ClassScore], found: Sequence[Confusion]) -> Html:
    """The worst classes against what they are taken for, darker where there are more of the class's images."""
    labels = [score.label for score in worst]
    total: dict[int, int] = {}
    for each in found:
        if each.label in labels:
            total[each.taken_for] = total.get(each.taken_for, 0) + each.images
    columns = sorted(total, key=lambda label: -total[label])[:_WORST]
    if not columns:
        return Html("")
    share = {(each.label, each.taken_for): each.share for each in found}
    share |= {(score.label, score.label): score.recall for score in worst}
    head = "".join(f"<th>{escape(_name(evaluated, label))}</th>" for label in columns)
    body = "".join(
        f"<tr><th>{escape(_name(evaluated, row))}</th>"
        + "".join(_cell(share.get((row, column), 0.0), row == column) for column in columns)
        + "</tr>"
        for row in labels
    )
    note = "Of the images of a class (rows), how many are taken for another (columns); blue where that is right."
    return Html(
        f'<div class="scroll matrix"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"{tag('p', note, kind='soft').text}"
    )


def _cell(share: float, is_right: bool) -> str:
    colour = "--c0" if is_right else "--c1"
    style = f' style="background:color-mix(in srgb, var({colour}) {share * 70:.0f}%, transparent)"' if share else ""
    return f'<td class="n"{style}>{f"{share:.0%}" if share else ""}</td>'


def _pairs(evaluated: Evaluated, found: Sequence[Confusion]) -> Html:
    if not found:
        return tag("p", "Nothing: every image is right.", kind="soft")
    rows: list[list[Cell]] = [
        [_name(evaluated, c.label), _name(evaluated, c.taken_for), f"{c.images:,}", fraction(c.share)]
        for c in found[:_PAIRS]
    ]
    return table(["class", "taken for", "images", "of the class"], rows, numbers=(2, 3))


def _mistakes(evaluated: Evaluated) -> Html:
    """Wrong answers, the most confident first, as pictures where there are any."""
    counted = np.flatnonzero(evaluated.truth.counted_N)
    wrong = counted[~hits(evaluated.probability_NK, evaluated.truth).top1_N]
    confidence = evaluated.probability_NK[wrong].max(1, initial=0.0)
    chosen = wrong[np.argsort(-confidence, kind="stable")[:_MISTAKES]]
    if not len(chosen):
        return tag("p", "None.", kind="soft")
    answered = answers(evaluated.probability_NK[chosen], 1)[:, 0]
    tiles = []
    for place, answer in zip(chosen.tolist(), answered.tolist(), strict=True):
        right = np.flatnonzero(evaluated.truth.accepted_NK[place]).tolist()
        said = f"{_name(evaluated, answer)}, {float(evaluated.probability_NK[place, answer]):.1%}"
        known = " or ".join(_name(evaluated, label) for label in right)
        tiles.append(
            f"<div class=tile>{_picture(evaluated.picture(place))}<b>{escape(said)}</b>"
            f"<span>is {escape(known)}</span><code>{escape(evaluated.keys[place])}</code></div>"
        )
    return Html(f'<div class="tiles">{"".join(tiles)}</div>')


def _picture(image: bytes | None) -> str:
    if image is None:
        return ""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f'<img alt="" src="data:image/{kind};base64,{b64encode(image).decode()}" />'


def _all_classes(evaluated: Evaluated, scores: Sequence[ClassScore]) -> Html:
    rows: list[list[Cell]] = [
        [str(s.label), _name(evaluated, s.label), f"{s.images:,}", fraction(s.recall),
         fraction(s.right_of_five / s.images if s.images else math.nan), fraction(s.precision)]
        for s in scores
    ]  # fmt: skip
    heads = ["label", "class", "images", "right", "right of five", "right when answered"]
    return Html(f"<details><summary>All {len(rows):,} classes</summary>"
                f"{table(heads, rows, (0, 2, 3, 4, 5)).text}</details>")  # fmt: skip


def _classes_csv(evaluated: Evaluated, scores: Sequence[ClassScore]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["label", "class", "images", "right", "right_of_five", "answered", "answered_rightly"])
    for s in scores:
        name = _name(evaluated, s.label)
        writer.writerow([s.label, name, s.images, s.right, s.right_of_five, s.answered, s.answered_rightly])
    return file.getvalue()
