"""BN-Inception under the names of Cadene and yjxiong, as safetensors: written, and read back as a network."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from pipeline import models
from pipeline.export.deployed import Deployed, stripped
from pipeline.export.description import PIXELS, Description, ExportError
from pipeline.export.weights import read_tensors, write_tensors
from pipeline.models.layouts import EPS, MEAN_BGR, OPTIONS, LayoutError, Mapped, from_cadene, mean_of, to_cadene
from pipeline.norm import SyncBatchNorm

FILE, TABLE = "model.safetensors", "layout.csv"
_SHRINKS = 32  # pixels of a side that become one
SETTINGS = "pretrained_settings"  # in the header, under the names of pretrainedmodels


def check(name: str, options: Mapping[str, Any], size: int) -> None:
    """size: pixels a side. Raises ExportError for a network, or images, that theirs is not the same function of."""
    wanted = {**OPTIONS, "width": 1.0, "activation": "relu", "response_norm": False, "per_activation": 0}
    wrong = [f"model.{key} = {options.get(key)}" for key, value in wanted.items() if options.get(key) != value]
    if name != "bn_inception" or wrong:
        raise ExportError(
            f"--format cadene: {', '.join(wrong) or f'model.name = {name}'} is not of that layout; "
            "it takes bn_inception trained with model.stem=dense model.literal_fig5=true model.count_padding=true"
        )
    if size % _SHRINKS:
        raise ExportError(
            f"--format cadene: data.image_size = {size} does not halve evenly five times, where their pools round "
            f"otherwise than ours; it takes multiples of {_SHRINKS}: choose --format safetensors"
        )


def write(network: nn.Module, description: Description, path: Path) -> None:
    """Their tensors, how an image becomes their input, and beside it which layer became which. Raises ExportError."""
    preprocessing = description.preprocessing
    check(description.name, description.options, preprocessing.size)
    try:
        tensors, rows = to_cadene(network.state_dict(), preprocessing.std, description.eps)
    except LayoutError as error:
        raise ExportError(f"--format cadene: {error}") from None
    settings = {
        "input_space": "BGR", "input_size": [3, preprocessing.size, preprocessing.size], "input_range": [0, 255],
        "mean": [255 * value for value in reversed(preprocessing.mean)], "std": [1, 1, 1],
        "num_classes": description.num_classes,
    }  # fmt: skip
    write_tensors(tensors, {SETTINGS: json.dumps(settings)}, path)
    write_table(rows, path.with_name(TABLE))


def load(path: Path) -> tuple[Deployed, int]:
    """Their file as a network of ours that takes uint8 pixels in RGB, and how many tensors it holds."""
    tensors, header = read_tensors(path)
    mean = mean_of(settings_of(header)["mean"])
    std = [1 / 255] * 3
    ours, rows = from_cadene(tensors, std)
    norm = partial(SyncBatchNorm, eps=EPS)
    options: dict[str, Any] = dict(OPTIONS)
    network = models.build("bn_inception", num_classes=rows[-1].shape[0], norm=norm, **options)
    network.load_state_dict(ours)
    return Deployed(stripped(network), mean, std, PIXELS).eval(), len(tensors)


def settings_of(header: dict[str, str]) -> dict[str, Any]:
    """How an image becomes their input, as a file of ours says it; of others', as it is known of them."""
    try:
        settings: dict[str, Any] = json.loads(header[SETTINGS])
        mean = settings["mean"]
        if len(mean) == 3 and all(isinstance(value, int | float) for value in mean):
            return settings
    except (KeyError, ValueError, TypeError):
        pass
    return {"mean": list(MEAN_BGR)}


def write_table(rows: Sequence[Mapped], path: Path) -> None:
    """A row for each layer: name there, name here, shape, and what was done to it."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Mapped._fields)
        writer.writerows((*row[:2], "x".join(map(str, row.shape)), row.how) for row in rows)
