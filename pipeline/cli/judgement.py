"""What an evaluation says by the labels and classes that are asked for: a page, and scores where they are others."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.decode import decode
from pipeline.data.evaluation_set import accepted_answers
from pipeline.data.images import Fault, open_images
from pipeline.data.shards import MANIFEST, read_manifest
from pipeline.evaluation.intervals import Interval, wilson
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.quality import hits
from pipeline.evaluation.truth import Truth, one_label, several_labels
from pipeline.report.evaluation import Evaluated, make_evaluation_page

if TYPE_CHECKING:
    from pipeline.run.evaluating import Question

REPORT = "report"
_PICTURE = 112  # pixels of a picture's longer side


@dataclass(frozen=True, slots=True)
class Judge:
    """labels: a file of right answers; None = each image's own label. within: only the set's classes are answers."""

    labels: Path | None = None
    within: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the scores are those that the evaluation keeps."""
        return self.labels is None and not self.within

    def truth(self, predictions: Predictions) -> Truth:
        """Raises DataError for labels that do not fit."""
        if self.labels is None:
            return one_label(predictions.label_N, predictions.classes)
        answers = accepted_answers(self.labels, predictions.key, predictions.classes)
        return several_labels(predictions.label_N, answers, predictions.classes)

    def seen(self, predictions: Predictions, question: Question) -> Predictions:
        """What counts of them: the probabilities of the set's classes alone, as parts of their sum, if so asked."""
        if not self.within:
            return predictions
        is_class_K = np.zeros(predictions.classes, dtype=np.bool_)
        is_class_K[question.source.label_of] = True
        kept_NK = np.where(is_class_K, predictions.probability_NK, 0).astype(np.float64)
        kept_NK /= np.maximum(kept_NK.sum(1, keepdims=True), np.finfo(np.float64).tiny)
        return Predictions(predictions.sample_N, predictions.key, predictions.label_N, kept_NK.astype(np.float32))

    @property
    def name(self) -> str:
        """Of its page's directory."""
        parts = [REPORT, *([self.labels.stem] if self.labels else []), *(["within"] if self.within else [])]
        return "-".join(parts)


def shares(predictions: Predictions, truth: Truth) -> tuple[Interval, Interval, int]:
    """Shares of right images, by the first answer and by the first five, and how many images count."""
    found = hits(predictions.probability_NK, truth)
    total = len(found.top1_N)
    return wilson(int(found.top1_N.sum()), total), wilson(int(found.top5_N.sum()), total), total


def make_page(
    title: str, question: Question, predictions: Predictions, truth: Truth, output: Path, *, command: str,
    facts: Sequence[tuple[str, str]] = (), members: tuple[Sequence[str], Sequence[Sequence[str]]] = ((), ()),
    notes: Sequence[str] = (),
) -> Path:  # fmt: skip
    """The page of predictions of one network, or of several networks' mean; returns its path. Raises OSError."""
    top1, top5, total = shares(predictions, truth)
    views = f"{question.views} view{'s' if question.views > 1 else ''}"
    head = [_fact("top-1", top1), _fact("top-5", top5), (f"images, {views} of each", f"{total:,}"), *facts]
    matched = [question.source.remark] if question.source.remark else []
    what = Evaluated(
        title, head, _names(question), predictions.key, truth, predictions.probability_NK, members,
        notes=[*notes, *matched], picture=_pictures(question, predictions),
    )  # fmt: skip
    return make_evaluation_page(what, output, command=command, now=datetime.now(tz=UTC))


def _fact(name: str, share: Interval) -> tuple[str, str]:
    return f"{name}; 95 %: {share.low:.2%} to {share.high:.2%}", f"{share.value:.2%}"


def _names(question: Question) -> list[str]:
    """Of the run's classes, by label; its own manifest knows words where the data set is another's."""
    directory = question.config.directory
    own = read_manifest(directory).classes if (directory / MANIFEST).is_file() else []
    return [each.name or each.id for each in own]


def _pictures(question: Question, predictions: Predictions) -> Callable[[int], bytes | None]:
    from PIL import Image

    source = question.source
    images = open_images(source.dataset, source.split, source.classes)

    def picture(place: int) -> bytes | None:
        loaded = images.load(int(predictions.sample_N[place]), decode)
        if isinstance(loaded, Fault):
            return None
        small = Image.fromarray(loaded)
        if max(small.size) > _PICTURE:
            small.thumbnail((_PICTURE, _PICTURE))
        file = io.BytesIO()
        small.save(file, "PNG" if max(small.size) <= 48 else "JPEG", quality=85)
        return file.getvalue()

    return picture
