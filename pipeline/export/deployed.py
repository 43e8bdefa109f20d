"""A network as it is deployed: from pixels to logits, nothing in it that trains.

Legend: N images, C colours, H, W pixels, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.export.description import NORMALIZED, ExportError
from pipeline.models.inception import Logits
from pipeline.norm import SyncBatchNorm, fold


class Deployed(nn.Module):
    """Logits (N, K) of images (N, 3, H, W): uint8 pixels in RGB, or what `normalized` makes of them.

    mean, std: of pixels in 0..1, per colour.
    """

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float], takes: str):
        super().__init__()
        self.network, self.takes = network, takes
        deviation = torch.tensor(std, dtype=torch.float64)
        # As in training: rounded once, from the quotients.
        scale, shift = 1 / (255 * deviation), torch.tensor(mean, dtype=torch.float64) / deviation
        self.register_buffer("scale_C11", scale.float().view(3, 1, 1))
        self.register_buffer("shift_C11", shift.float().view(3, 1, 1))
        self.scale_C11: Tensor
        self.shift_C11: Tensor

    def normalized(self, pixel_NCHW: Tensor) -> Tensor:
        """Float32 input of the network, of uint8 pixels."""
        return pixel_NCHW.float() * self.scale_C11 - self.shift_C11

    def forward(self, images: Tensor) -> Tensor:
        output = self.network(images if self.takes == NORMALIZED else self.normalized(images))
        logits_NK: Tensor = output.main_NK if isinstance(output, Logits) else output
        return logits_NK


def stripped(network: nn.Module) -> nn.Module:
    """A copy for inference, in float32 on the CPU, laid out plainly, without the head that helps in training alone."""
    bare = copy.deepcopy(network).to("cpu", torch.float32).to(memory_format=torch.contiguous_format)
    if getattr(bare, "auxiliary", None) is not None:
        setattr(bare, "auxiliary", None)  # noqa: B010  (an optional part, of which nn.Module knows no type)
    return bare.eval().requires_grad_(requires_grad=False)


def folded(network: nn.Module) -> nn.Module:
    """A stripped copy whose norms are folded into what comes before them. Raises ExportError."""
    if not any(isinstance(m, SyncBatchNorm | _BatchNorm) for m in network.modules()):  # nor need it be traced then
        return stripped(network)
    try:
        return stripped(fold(stripped(network)))
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
        raise ExportError(
            f"{type(network).__name__} computes in ways that depend on values, so its norms cannot be folded ({error});"
            " export it with --format safetensors --keep-norms"
        ) from None
