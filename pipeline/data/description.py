"""What a packed data set holds: counts, classes, sizes, and a sheet of sample images to look at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from pipeline.data.dataset import Dataset
from pipeline.data.decode import DecodeError, decode
from pipeline.data.keyed_random import mixed, permutation
from pipeline.data.order import shard_mixing
from pipeline.data.split import Split
from pipeline.data.stream import ShardStream


@dataclass(frozen=True, slots=True)
class SplitFacts:
    """One split in numbers. bytes_*: of the stored images. Widths and heights in pixels, of up to 256 of them.

    mixing: label entropy of a shard over that of as many samples of all; near 0 = sorted by class.
    """

    samples: int
    shards: int
    bytes_mean: float
    bytes_total: int
    class_fewest: int
    class_most: int
    width: tuple[int, int, int]  # smallest, median, largest
    height: tuple[int, int, int]
    mixing: float


def describe(dataset: Dataset) -> dict[str, SplitFacts]:
    """Facts of every split. Raises DataError."""
    return {name: _facts(dataset, dataset.split(name)) for name in dataset.manifest.splits}


def contact_sheet(dataset: Dataset, split_name: str, columns: int = 10, rows: int = 6, cell: int = 96) -> Image.Image:
    """Columns x rows images, of as many classes as fit, each with its label. Damaged ones are crossed out."""
    split = dataset.split(split_name)
    stream, caption = ShardStream(dataset, split, whole=False), 14
    sheet = Image.new("RGB", (columns * cell, rows * (cell + caption)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, sample in enumerate(_spread(split, columns * rows)):
        x, y = place % columns * cell, place // columns * (cell + caption)
        try:
            image = Image.fromarray(decode(stream.read(sample)))
            scale = (cell - 4) / max(image.size)
            shown = image.resize([max(1, round(side * scale)) for side in image.size],
                                 Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BILINEAR)  # fmt: skip
            sheet.paste(shown, (x + (cell - shown.width) // 2, y + (cell - shown.height) // 2))
        except DecodeError:
            draw.line((x, y, x + cell, y + cell), "red")
        name = dataset.manifest.classes[split.label_S[sample]].name
        draw.text((x + 3, y + cell - 1), name[: cell // 7], "black")
    stream.close()
    return sheet


def _facts(dataset: Dataset, split: Split) -> SplitFacts:
    per_class = np.bincount(split.label_S, minlength=len(dataset.manifest.classes))
    stream = ShardStream(dataset, split, whole=False)
    sides = []
    for sample in permutation(len(split), key=0)[:256]:
        try:
            sides.append(decode(stream.read(int(sample))).shape[:2])
        except DecodeError:
            continue
    stream.close()
    height_width = np.array(sides or [(0, 0)])

    def spread(column: int) -> tuple[int, int, int]:
        values = height_width[:, column]
        return int(values.min()), int(np.median(values)), int(values.max())

    return SplitFacts(
        samples=len(split),
        shards=len(split.entries),
        bytes_mean=float(split.length_S.mean()),
        bytes_total=int(split.length_S.sum()),
        class_fewest=int(per_class.min()),
        class_most=int(per_class.max()),
        width=spread(1),
        height=spread(0),
        mixing=shard_mixing(split.shard_counts, split.label_S),
    )


def _spread(split: Split, wanted: int) -> list[int]:
    """Samples that take turns over the classes, in a fixed random order."""
    order = permutation(len(split), mixed(1))
    labels = split.label_S[order]
    by_class = np.argsort(labels, kind="stable")
    turn = np.concatenate([np.arange(n) for n in np.bincount(labels)])
    chosen = by_class[np.argsort(turn, kind="stable")][:wanted]
    return [int(order[i]) for i in sorted(chosen, key=lambda i: int(labels[i]))]
