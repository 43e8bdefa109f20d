"""Whether a file computes what the network that was trained does: on real images, before the file is kept.

Legend: N images, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pipeline.export.description import ExportError

TOLERANCE = 1e-5  # of a probability
ROUNDINGS = 4  # times that the trained network itself rounds in float32, where that is more: deep ones do
MOST = 1e-3


class Parity(NamedTuple):
    """difference: the largest of any probability from the exact one. swapped: images whose first class is another."""

    images: int
    difference: float
    swapped: int
    tolerance: float

    def __str__(self) -> str:
        return (f"probabilities within {self.difference:.1e} of the trained network's on {self.images} validation "
                f"images (tolerance {self.tolerance:.1e}), top-1 equal")  # fmt: skip


def compared(exact_NK: Tensor, trained_NK: Tensor, exported_NK: Tensor) -> Parity:
    """Of logits: the trained network's in float64, its own in float32, and the file's. A NaN is a difference.

    A first class that is no more likely than another by the tolerance may give way to that.
    """
    exact, own, other = (logits_NK.double().softmax(1) for logits_NK in (exact_NK, trained_NK, exported_NK))
    rounding = float((own - exact).abs().max())
    tolerance = min(max(TOLERANCE, ROUNDINGS * rounding), MOST)
    behind_N = exact.amax(1) - exact.gather(1, other.argmax(1, keepdim=True))[:, 0]
    return Parity(len(exact), float((other - exact).abs().max()), int((~(behind_N <= tolerance)).sum()), tolerance)


def check(parity: Parity, what: str) -> None:
    """Raises ExportError beyond the tolerance."""
    if parity.difference <= parity.tolerance and not parity.swapped:
        return
    raise ExportError(
        f"{what} is not kept: its probabilities differ by up to {parity.difference:.1e} from the trained network's on "
        f"{parity.images} images (tolerance {parity.tolerance:.1e}), and {parity.swapped} have another first class; "
        "this is a fault of the exporter: try another format, or other versions of torch and onnxruntime"
    )
