"""How fast a step is here: the real model, loss and optimizer on random images, for two seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from pipeline.data.augment import UNCHANGED
from pipeline.data.batch import Batch, collate
from pipeline.doctor.findings import Finding, ok
from pipeline.training.classifier import Classifier
from pipeline.training.optimizer import build_optimizer


@dataclass(frozen=True, slots=True)
class Pace:
    """images: of the step that was timed. seconds: it took. repeats: steps of which that is the median; 0 = the first.

    The first step takes longer than those after it: memory is asked for, and kernels are chosen.
    """

    images: int
    seconds: float
    repeats: int

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds


def random_batch(images: int, size: int, classes: int) -> Batch:
    random = np.random.default_rng(0)
    pixels = list(random.integers(0, 256, (images, size, size, 3), dtype=np.uint8))
    labels = [int(label) for label in random.integers(0, classes, images)]
    return collate(pixels, labels, range(images), [UNCHANGED] * images, range(images), size)


def measured(step: Callable[[int], None], most: int, budget: float = 2.0) -> Pace:
    """Pace of step(images), of as many images as the time allows; most: images of a rank's micro-batch."""
    began = time.perf_counter()
    images = min(2, most)
    first = _timed(step, images)
    if first > budget / 2:  # a large network on a small machine: the first step has to do
        return Pace(images, first, 0)
    seconds = _timed(step, images)
    left = budget - (time.perf_counter() - began)
    fitting = max(images, min(most, int(images * left / 4 / seconds)))
    if fitting > images:
        images = fitting
        step(images)
        seconds = _timed(step, images)
    taken = [seconds]
    while time.perf_counter() - began + median(taken) < budget and len(taken) < 50:
        taken.append(_timed(step, images))
    return Pace(images, median(taken), len(taken))


def stepper(classifier: Classifier, *, image_size: int, classes: int, device: str, bf16: bool) -> Callable[[int], None]:
    """A training step of that many images, as one process takes it."""
    classifier.to(device).train()
    optimizer = build_optimizer(classifier.model, classifier.descent)
    for group in optimizer.param_groups:
        group["lr"] = 1e-6  # on noise the real one may end in NaN
    batches: dict[int, Batch] = {}

    def step(images: int) -> None:
        if images not in batches:
            batches[images] = Batch(*(part.to(device) for part in random_batch(images, image_size, classes)))
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = classifier.training_step(batches[images], 0)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def check_pace(pace: Pace, *, images: int, steps: int, batch: int, world: int, device: str, busy: str = "",
               grows: bool = False) -> Iterator[Finding]:  # fmt: skip
    """What a measured step means for the run. images: of an epoch; steps: of the run; busy: what else goes on here.

    grows: its images do, and the step was one at full size.
    """
    rate, seconds = pace.images_per_s, pace.seconds
    took = f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
    how = f"median of {pace.repeats}" if pace.repeats else "the first one, later ones take less"
    least, most = ("", "") if pace.repeats else ("at least ", "at most ")
    yield ok("step", f"{pace.images} images in {took} ({how}): {least}{rate:,.3g} images/s, "
             f"{_count(rate * 86400)} a day; on this machine{busy}, one process, {device}, without loading"
             f"{', at full size' if grows else ''}")  # fmt: skip
    most = "at most " if grows else most  # earlier epochs take less
    total = steps * batch / rate
    text = f"an epoch takes {most}{_time(images / rate)}, the run of {steps:,} steps {most}{_time(total)}"
    if world > 1:
        text += f" by one process, {most}{_time(total / world)} by {world} that cost each other nothing"
    yield ok("time", text)


def _timed(step: Callable[[int], None], images: int) -> float:
    began = time.perf_counter()
    step(images)
    return time.perf_counter() - began


def _time(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 100 * length else f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.2g} s"


def _count(images: float) -> str:
    return f"{images / 1e6:.3g} million" if images >= 1e6 else f"{images:,.0f}"
