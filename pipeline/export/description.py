"""What an exported network is: how to build it, what it takes and what its classes are called. It travels in the file.

model.json beside each file holds the same, and facts of the run that nothing is computed from.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = "pipeline-export/1"
PIXELS, NORMALIZED = TAKES = ("pixels", "normalized")
FOLDED, KEPT = "folded", "kept"


class ExportError(Exception):
    """A network that cannot be exported, or a file that is none: the message names what, why and the way out."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """From a decoded image to the network's input: central square, resized, scaled to 0..1, normalized per colour."""

    size: int  # pixels a side
    crop: float  # side of the central square, fraction of the image's shorter side
    mean: list[float]  # of pixels in 0..1, as std
    std: list[float]
    colours: str = "RGB"
    interpolation: str = "bilinear, antialiased"


@dataclass(frozen=True, slots=True)
class Description:
    """takes: pixels (uint8 0..255) or normalized (float32). norms: folded or kept. eps: of kept ones of our own models.

    name, options: those of models.build. classes: (id, name) of each. facts: of the run, for people.
    """

    name: str
    options: dict[str, Any]
    num_classes: int
    preprocessing: Preprocessing
    classes: list[list[str]] = field(default_factory=list)
    takes: str = PIXELS
    norms: str = FOLDED
    eps: float = 1e-3
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=indent, ensure_ascii=indent is None)


def parse(text: str, where: str) -> Description:
    """Raises ExportError for what is no description of this version's."""
    try:
        content = json.loads(text)
        known = content.pop("format")
        if known != FORMAT:
            raise ExportError(f"{where} is of format {known}, this version reads {FORMAT}; read it with the newer one")
        content["preprocessing"] = Preprocessing(**content["preprocessing"])
        return Description(**content)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ExportError(f"{where} describes no network of `pipeline export`; export the run again") from None
