"""One layer's arithmetic in fused kernels, for channels-last tensors on a GPU; `normalization` is their oracle.

It offers the same names. Memory passes over the activation: moments 1 read; normalize + ReLU 1 read, 1 write; backward
sums 2 reads, with the ReLU's mask computed again from x instead of read; dx 2 reads, 1 write. No value is read on the
host.

A tensor (N, C, *) is taken as rows (M, C) with the channels beside one another, and any distance between rows:
a slice of a concatenation's channels is read and written where it lies.
Legend: M = N x pixels rows, C channels, K parts, R ranks, P = 2C + 1 numbers of a packet (moments.py).
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.norm import kernels
from pipeline.norm.normalization import Running, Statistics

_TILE = 2048  # elements that a program holds at once
_PARTS = 512  # programs that share the sums of a layer: about four for each multiprocessor of a large GPU
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class Rows(NamedTuple):
    """How a tensor lies as rows of channels: how many, and elements from one to the next."""

    number: int
    stride: int


def rows_of(x: Tensor) -> Rows | None:
    """X (N, C, *) as rows; None if it does not lie so."""
    channels = x.shape[1]
    if channels > 1 and x.stride(1) != 1:
        return None
    rows = Rows(1, 0)
    for axis in (*range(x.dim() - 1, 1, -1), 0):
        size, step = x.shape[axis], x.stride(axis)
        if size == 1:
            continue
        if rows.number == 1 and step >= channels:
            rows = Rows(size, step)
        elif rows.number > 1 and step == rows.number * rows.stride:
            rows = Rows(rows.number * size, rows.stride)
        else:
            return None
    return rows


def serves(x: Tensor) -> bool:
    """Whether the kernels take it: on a GPU that Triton runs on, not empty, in rows, and of a type that is not float64.

    Ranks need not agree: what they exchange is the same.
    """
    fits = kernels.IS_THERE and x.is_cuda and x.numel() > 0 and x.dtype in _TYPES and rows_of(x) is not None
    return fits and _runs(x.device.index)


@functools.cache
def _runs(device: int) -> bool:
    """Whether a first kernel can be compiled and launched. Says why not, once."""
    try:
        packet(torch.zeros(1, 1, device=torch.device("cuda", device)))
    except Exception as error:  # no compiler for Triton's stub, a GPU that it has left behind, a broken cache, ...
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"fused normalization is not available on GPU {device} ({reason}): plain operations do its work, slower; "
            "Triton needs gcc and Python's headers (python3-dev), and a GPU of compute capability 7.0 or newer",
            stacklevel=2,
        )
        return False
    return True


def packet(x: Tensor) -> Tensor:
    """The moments of x as a packet (P,) in float64."""
    rows, channels = _rows(x), x.shape[1]
    split = _split(rows.number, channels)
    parts_K2C = x.new_empty(split.parts, 2, channels, dtype=torch.float32)
    merged_P = x.new_empty(2 * channels + 1, dtype=torch.float64)
    _launch(
        kernels.moments_of_parts, (split.parts, split.columns), x, rows.stride, rows.number, channels, split.share,
        parts_K2C, BLOCK_M=split.block_m, BLOCK_C=split.block_c,
    )  # fmt: skip
    _launch(
        kernels.moments_of_all, (split.columns,), x, rows.number, channels, split.share, split.parts, parts_K2C,
        merged_P, BLOCK_C=split.block_c,
    )  # fmt: skip
    return merged_P


def statistics(
    rows_RP: Tensor, weight_C: Tensor | None, eps: float, arithmetic: torch.dtype, running: Running | None
) -> Statistics:
    """Those of the union of the ranks' packets, which `running` takes in. arithmetic: float32, always."""
    assert arithmetic == torch.float32
    ranks, channels = len(rows_RP), (rows_RP.shape[1] - 1) // 2
    block = _block_c(channels)
    mean_C, scale_C = (rows_RP.new_empty(channels, dtype=arithmetic) for _ in range(2))
    invstd_C, total = rows_RP.new_empty(channels), rows_RP.new_empty(())
    momentum = None if running is None else running.momentum
    _launch(
        kernels.statistics, (_blocks(channels, block),), rows_RP, rows_RP.stride(0), ranks, channels,
        mean_C if weight_C is None else weight_C, mean_C if running is None else running.mean_C,
        mean_C if running is None else running.var_C, total if running is None else running.batches,
        mean_C, scale_C, invstd_C, total, EPS=eps, MOMENTUM=momentum or 0.0, AFFINE=weight_C is not None,
        TRACKS=running is not None, CUMULATIVE=running is not None and momentum is None, BLOCK_C=block,
    )  # fmt: skip
    if running is not None:
        running.batches.add_(total > 0)
    return Statistics(mean_C, scale_C, invstd_C, total)


def room(x: Tensor, channels: int) -> Tensor:
    """An empty tensor of so many channels over the pixels of x, of which layers can be given slices to write."""
    return _empty(x, channels)


def normalized(
    x: Tensor, known: Statistics, bias_C: Tensor | None, activation: str | None, out: Tensor | None = None
) -> Tensor:
    """y, in the type of x; written into `out` if that is given, a slice of a larger tensor's channels."""
    y = _empty(x, x.shape[1]) if out is None else out
    source, target, channels = _rows(x), _rows(y), x.shape[1]
    block_c = _block_c(channels)
    block_m = _TILE // block_c
    _launch(
        kernels.normalize, (_blocks(source.number, block_m), _blocks(channels, block_c)), x, source.stride,
        source.number, channels, known.mean_C, known.scale_C, known.mean_C if bias_C is None else bias_C, y,
        target.stride, BIASED=bias_C is not None, RELU=activation == "relu", BLOCK_M=block_m, BLOCK_C=block_c,
    )  # fmt: skip
    return y


class Backward:
    """A layer's share of a backward: its sums over this rank, then dx when those over the group are known."""

    def __init__(self, dy: Tensor, x: Tensor, known: Statistics, bias_C: Tensor | None, activation: str | None):
        self.dy, self.x, self.known = _in_rows(dy), _in_rows(x), known
        self.bias_C, self.how = bias_C, {"BIASED": bias_C is not None, "RELU": activation == "relu"}
        rows, channels = _rows(self.x), x.shape[1]
        split = _split(rows.number, channels)
        parts_K2C = x.new_empty(split.parts, 2, channels, dtype=torch.float32)
        self.sums_2C = x.new_empty(2 * channels, dtype=torch.float64)
        _launch(
            kernels.sums_of_parts, (split.parts, split.columns), self.dy, _rows(self.dy).stride, self.x, rows.stride,
            rows.number, channels, split.share, known.mean_C, known.scale_C,
            known.mean_C if bias_C is None else bias_C, parts_K2C,
            **self.how, BLOCK_M=split.block_m, BLOCK_C=split.block_c,
        )  # fmt: skip
        _launch(
            kernels.sums_of_all, (split.columns,), parts_K2C, split.parts, channels, known.invstd_C, self.sums_2C,
            BLOCK_C=split.block_c,
        )  # fmt: skip

    def dx(self, totals_RP: Tensor) -> Tensor:
        """Dx. totals_RP: the sums of the ranks (R, 2C), which are added up here."""
        x, known, dx = self.x, self.known, _empty(self.x, self.x.shape[1])
        source, channels = _rows(x), x.shape[1]
        block_c = _block_c(channels)
        block_m = _TILE // block_c
        level_C, slope_C = torch.empty_like(known.mean_C), torch.empty_like(known.mean_C)
        _launch(
            kernels.coefficients, (_blocks(channels, block_c),), totals_RP, totals_RP.stride(0), len(totals_RP),
            channels, known.invstd_C, known.total, level_C, slope_C, BLOCK_C=block_c,
        )  # fmt: skip
        _launch(
            kernels.differentiate, (_blocks(source.number, block_m), _blocks(channels, block_c)), self.dy,
            _rows(self.dy).stride, x, source.stride, source.number, channels, known.mean_C, known.scale_C,
            known.mean_C if self.bias_C is None else self.bias_C, level_C, slope_C, dx, _rows(dx).stride,
            **self.how, BLOCK_M=block_m, BLOCK_C=block_c,
        )  # fmt: skip
        return dx


class _Split(NamedTuple):
    """How the sums of a layer are shared out: parts of so many rows each, over blocks of channels."""

    parts: int
    share: int
    columns: int
    block_m: int
    block_c: int


def _split(rows: int, channels: int) -> _Split:
    block_c = _block_c(channels)
    block_m, columns = _TILE // block_c, _blocks(channels, block_c)
    tiles = _blocks(rows, block_m)
    share = _blocks(tiles, max(1, _PARTS // columns)) * block_m
    return _Split(_blocks(rows, share), share, columns, block_m, block_c)


def _block_c(channels: int) -> int:
    """Channels of a tile: a power of two that holds them, of 16 to 128."""
    return min(128, max(16, 1 << (channels - 1).bit_length()))


def _blocks(number: int, size: int) -> int:
    return -(-number // size)


def _launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *others: Any, **constants: Any) -> None:
    """On the device of its first tensor, which need not be the current one.

    A product and a sum stay two roundings: the mask that a backward computes again is then that of the forward pass.
    """
    with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
        kernel[grid](first, *others, **constants, enable_fp_fusion=False)


def _empty(x: Tensor, channels: int) -> Tensor:
    """A tensor of x's images, pixels and type, channels last and dense whatever x is a slice of.

    No view of another: what autograd hands out as one may not be changed in place, as a ReLU behind it would.
    """
    shape = (x.shape[0], channels, *x.shape[2:])
    strides: list[int] = []
    step = channels
    for size in reversed(shape[2:]):
        strides.insert(0, step)
        step *= size
    return x.new_empty_strided(shape, (step, 1, *strides))


def _in_rows(x: Tensor) -> Tensor:
    """x, laid out anew if it must be: a gradient of a mean over pixels is expanded, saved tensors may be moved away."""
    return x if rows_of(x) is not None else _empty(x, x.shape[1]).copy_(x)


def _rows(x: Tensor) -> Rows:
    rows = rows_of(x)
    assert rows is not None, "not in rows: ask `serves` first"
    return rows
