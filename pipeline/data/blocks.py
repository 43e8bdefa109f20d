"""Images to be evaluated, in blocks that go through the network together, whatever the ranks.

A rank takes whole blocks, each `world`-th, so that what a network says of an image does not depend on who asks it: not
in its last bit either. A block has one shape always: a bad image, and what the last one lacks, is padding.
Legend: V views of an image; a block's rows are the views of its first image, then of its second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pipeline.data.batch import Batch, collate
from pipeline.data.crops import Views
from pipeline.data.decode import Pixels
from pipeline.data.evaluation_set import EvaluationSet
from pipeline.data.images import Fault, Images, open_images
from pipeline.data.loader import Item, Workers


class Blocks:
    """The views of every image of a split, `images_each` images at a time. label_of: what a label there is called."""

    def __init__(self, images: Images, views: Views, images_each: int, label_of: Sequence[int]):
        self.images, self.views, self.images_each, self.label_of = images, views, images_each, label_of

    def __len__(self) -> int:
        return math.ceil(len(self.images.split) / self.images_each)

    def samples(self, number: int) -> range:
        """Numbers of the images of one block."""
        first = number * self.images_each
        return range(first, min(first + self.images_each, len(self.images.split)))

    def load(self, number: int) -> Item:
        samples: list[int] = []
        pixels: list[Pixels] = []
        faults: list[Fault] = []
        for sample in self.samples(number):
            loaded = self.images.load(sample, self.views.of)
            if isinstance(loaded, Fault):
                faults.append(loaded)
            else:
                samples.append(sample)
                pixels += loaded
        labels = [int(self.label_of[self.images.split.label_S[s]]) for s in samples]
        each, total = self.views.count, self.views.count * self.images_each
        batch = collate(
            pixels, _repeated(labels, each), [0] * len(pixels), self.views.variations * len(samples),
            _repeated(samples, each), self.views.size, total,
        )  # fmt: skip
        return batch, faults


def _repeated(values: Sequence[int], times: int) -> list[int]:
    return [value for value in values for _ in range(times)]


def open_blocks(source: EvaluationSet, views: Views, images_each: int) -> Blocks:
    """The images of a set. Raises DataError."""
    images = open_images(source.dataset, source.split, source.classes)
    return Blocks(images, views, images_each, source.label_of.tolist())


class BlockLoader:
    """Blocks by their numbers, in that order. faults: of the block handed out last."""

    def __init__(self, workers: Workers, numbers: Sequence[int]):
        self.workers, self.numbers = workers, numbers
        self.faults: list[Fault] = []

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Batch]:
        for batch, faults in self.workers.load(None, self.numbers):
            self.faults = faults
            yield batch
