"""Gradients of convolutions' weights, computed later than autograd would: while an exchange is under way.

A convolution's backward has two halves. The gradient of its input is what everything before it waits for; that of
its weight nobody waits for. Here the first runs at its place, and the second when the norm before the
convolution asks: its node in the graph takes the weight as an input, so that autograd and whoever hooks into it
(DDP's buckets) see one gradient of each weight, as ever.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class LateGradients:
    """The convolutions of one forward pass whose weights' gradients somebody else asks for."""

    def __init__(self, convolutions: Iterable[nn.Conv2d]):
        self.convolutions = list(convolutions)
        self._halves: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # dy, x and weight, by place in the list

    @property
    def weights(self) -> list[Tensor]:
        """What the node that asks has to take as inputs, in the order of `gradients`."""
        return [conv.weight for conv in self.convolutions]

    def convolve(self, conv: nn.Module, x: Tensor) -> Tensor:
        """conv(x), with the second half of its backward put off if it is one of ours."""
        place = next((i for i, ours in enumerate(self.convolutions) if ours is conv), None)
        if place is None or not _is_plain(conv, x):
            output: Tensor = conv(x)
            return output
        assert isinstance(conv, nn.Conv2d)
        weight = conv.weight.detach()
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        late: Tensor = _Convolution.apply(x, weight, conv, self, place)
        return late

    def gradients(self) -> list[Tensor | None]:
        """The weights' gradients; None for a convolution that was not run."""
        halves, self._halves = self._halves, {}
        return [_weight_gradient(conv, *halves[i]) if i in halves else None for i, conv in enumerate(self.convolutions)]

    def put_off(self, place: int, dy: Tensor, x: Tensor, weight: Tensor) -> None:
        self._halves[place] = (dy, x, weight)


def _is_plain(conv: nn.Module, x: Tensor) -> bool:
    """Whether its backward is nothing but the two halves, and nobody watches its calls."""
    assert isinstance(conv, nn.Conv2d)
    watched = conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks
    return (
        conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and not watched
        and (x.dtype != torch.float64 or not torch.is_autocast_enabled(x.device.type))
    )


class _Convolution(torch.autograd.Function):
    """A convolution without bias, whose backward computes the gradient of its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, conv: nn.Conv2d, late: LateGradients, place: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.conv, ctx.late, ctx.place = conv, late, place
        return nn.functional.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.late.put_off(ctx.place, dy, x, weight)
        dx = _backward(ctx.conv, dy, x, weight, [True, False, False])[0] if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None


def _weight_gradient(conv: nn.Conv2d, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    gradient = _backward(conv, dy, x, weight, [False, True, False])[1]
    assert gradient is not None
    return gradient.to(conv.weight.dtype)


def _backward(conv: nn.Conv2d, dy: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
    halves: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
        dy, x, weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups, mask
    )
    return halves
