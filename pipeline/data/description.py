"""What a packed data set holds: counts, classes, sizes, and a sheet of sample images to look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pipeline.data.decode import DecodeError, decode
from pipeline.data.keyed_random import mixed, permutation
from pipeline.data.shards import Manifest, Split, load_split, read_manifest
from pipeline.data.stream import ShardStream


@dataclass(frozen=True, slots=True)
class SplitFacts:
    """One split in numbers. bytes_*: of the stored images. Widths and heights in pixels, of up to 256 of them."""

    samples: int
    shards: int
    bytes_mean: float
    bytes_total: int
    class_fewest: int
    class_most: int
    width: tuple[int, int, int]  # smallest, median, largest
    height: tuple[int, int, int]


def describe(root: Path) -> tuple[Manifest, dict[str, SplitFacts]]:
    """Facts of every split. Raises DataError."""
    manifest = read_manifest(root)
    return manifest, {name: _facts(load_split(root, manifest, name, len(manifest.classes)), len(manifest.classes))
                      for name in manifest.splits}  # fmt: skip


def contact_sheet(root: Path, split_name: str, columns: int = 10, rows: int = 6, cell: int = 96) -> Image.Image:
    """Columns x rows images, of as many classes as fit, each with its label. Damaged ones are crossed out."""
    manifest = read_manifest(root)
    split = load_split(root, manifest, split_name, len(manifest.classes))
    stream, caption = ShardStream(split), 14
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
        name = manifest.classes[split.label_S[sample]].name
        draw.text((x + 3, y + cell - 1), name[: cell // 7], "black")
    stream.close()
    return sheet


def _facts(split: Split, num_classes: int) -> SplitFacts:
    per_class = np.bincount(split.label_S, minlength=num_classes)
    stream = ShardStream(split)
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
        shards=len(split.shards),
        bytes_mean=float(split.length_S.mean()),
        bytes_total=int(split.length_S.sum()),
        class_fewest=int(per_class.min()),
        class_most=int(per_class.max()),
        width=spread(1),
        height=spread(0),
    )


def _spread(split: Split, wanted: int) -> list[int]:
    """Samples that take turns over the classes, in a fixed random order."""
    order = permutation(len(split), mixed(1))
    labels = split.label_S[order]
    by_class = np.argsort(labels, kind="stable")
    turn = np.concatenate([np.arange(n) for n in np.bincount(labels)])
    chosen = by_class[np.argsort(turn, kind="stable")][:wanted]
    return [int(order[i]) for i in sorted(chosen, key=lambda i: int(labels[i]))]
