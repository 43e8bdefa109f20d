"""One layer's arithmetic in fused Triton kernels, for channels-last tensors on a GPU; `normalization` is their oracle.

Memory passes over the activation: moments 1 read; normalize + ReLU 1 read, 1 write; backward sums 2 reads, with the
ReLU's mask computed again from x instead of read; dx 2 reads, 1 write. Sums are made in parts whose number depends
on the shape alone and merged in their order in float64, so bits repeat on every device of a type. No value is read on
the host.

A tensor (N, C, *) is taken as rows (M, C) with the channels beside one another, and any distance between rows:
a slice of a concatenation's channels is read and written where it lies.
Legend: M = N x pixels rows, C channels, K parts, R ranks, P = 2C + 1 numbers of a packet (moments.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.norm.normalization import Running, Statistics

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch without it, as for the CPU alone: then `serves` nothing
    triton = None

_TILE = 2048  # elements that a program holds at once
_PARTS = 512  # programs that share the sums of a layer: about four for each multiprocessor of a large GPU
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# A product and a sum stay two roundings: the mask that a backward computes again is then that of the forward pass.
_EXACT = {"enable_fp_fusion": False}


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
    """Whether the kernels take it: on a GPU, not empty, in rows, and of a type that is not float64."""
    return triton is not None and x.is_cuda and x.numel() > 0 and x.dtype in _TYPES and rows_of(x) is not None


def packet(x: Tensor) -> Tensor:
    """The moments of x as a packet (P,) in float64."""
    rows, channels = _rows(x), x.shape[1]
    split = _split(rows.number, channels)
    parts_K2C = x.new_empty(split.parts, 2, channels, dtype=torch.float32)
    merged_P = x.new_empty(2 * channels + 1, dtype=torch.float64)
    _moments_of_parts[split.parts, split.columns](
        x,
        rows.stride,
        rows.number,
        channels,
        split.share,
        parts_K2C,
        BLOCK_M=split.block_m,
        BLOCK_C=split.block_c,
        **_EXACT,
    )
    _moments_of_all[(split.columns,)](
        x, rows.number, channels, split.share, split.parts, parts_K2C, merged_P, BLOCK_C=split.block_c, **_EXACT
    )
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
    _statistics[(triton.cdiv(channels, block),)](
        rows_RP, rows_RP.stride(0), ranks, channels, eps, mean_C if weight_C is None else weight_C,
        mean_C if running is None else running.mean_C, mean_C if running is None else running.var_C,
        total if running is None else running.batches, 0.0 if running is None else running.momentum or 0.0,
        mean_C, scale_C, invstd_C, total,
        AFFINE=weight_C is not None, TRACKS=running is not None,
        CUMULATIVE=running is not None and running.momentum is None, BLOCK_C=block, **_EXACT,
    )  # fmt: skip
    if running is not None:
        running.batches.add_(total > 0)
    return Statistics(mean_C, scale_C, invstd_C, total)


def normalized(
    x: Tensor, known: Statistics, bias_C: Tensor | None, activation: str | None, out: Tensor | None = None
) -> Tensor:
    """y, in the type of x; written into `out` if that is given, which may be a slice of a larger tensor's channels."""
    y = _like(x) if out is None else out
    source, target, channels = _rows(x), _rows(y), x.shape[1]
    block_c = _block_c(channels)
    block_m = _TILE // block_c
    _normalize[triton.cdiv(source.number, block_m), triton.cdiv(channels, block_c)](
        x, source.stride, source.number, channels, known.mean_C, known.scale_C,
        known.mean_C if bias_C is None else bias_C, y, target.stride,
        BIASED=bias_C is not None, RELU=activation == "relu", BLOCK_M=block_m, BLOCK_C=block_c, **_EXACT,
    )  # fmt: skip
    return y


class Backward:
    """A layer's share of a backward: its sums over this rank, then dx when those over the group are known."""

    def __init__(
        self,
        dy: Tensor,
        x: Tensor,
        known: Statistics,
        bias_C: Tensor | None,
        activation: str | None,
    ):
        # A gradient that does not lie in rows (an expanded one, of a mean over pixels) is laid out as x is.
        self.dy = dy if rows_of(dy) is not None else _like(x).copy_(dy)
        self.x, self.known = x, known
        self.bias_C, self.how = bias_C, {"BIASED": bias_C is not None, "RELU": activation == "relu", **_EXACT}
        rows, channels = _rows(x), x.shape[1]
        split = _split(rows.number, channels)
        parts_K2C = x.new_empty(split.parts, 2, channels, dtype=torch.float32)
        self.sums_2C = x.new_empty(2 * channels, dtype=torch.float64)
        _sums_of_parts[split.parts, split.columns](
            self.dy, _rows(self.dy).stride, x, rows.stride, rows.number, channels, split.share, known.mean_C,
            known.scale_C, known.mean_C if bias_C is None else bias_C, parts_K2C,
            **self.how, BLOCK_M=split.block_m, BLOCK_C=split.block_c,
        )  # fmt: skip
        _sums_of_all[(split.columns,)](
            parts_K2C, split.parts, channels, known.invstd_C, self.sums_2C, BLOCK_C=split.block_c, **_EXACT
        )

    def dx(self, totals_RP: Tensor) -> Tensor:
        """Dx. totals_RP: the sums of the ranks (R, 2C), which are added up here."""
        x, known, dx = self.x, self.known, _like(self.x)
        source, channels = _rows(x), x.shape[1]
        block_c = _block_c(channels)
        block_m = _TILE // block_c
        _differentiate[triton.cdiv(source.number, block_m), triton.cdiv(channels, block_c)](
            self.dy, _rows(self.dy).stride, x, source.stride, source.number, channels, known.mean_C, known.scale_C,
            known.mean_C if self.bias_C is None else self.bias_C, known.invstd_C, known.total,
            totals_RP, totals_RP.stride(0), len(totals_RP), dx, _rows(dx).stride,
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
    block_m, columns = _TILE // block_c, -(-channels // block_c)
    tiles = -(-rows // block_m)
    share = -(-tiles // max(1, _PARTS // columns)) * block_m
    return _Split(-(-rows // share), share, columns, block_m, block_c)


def _block_c(channels: int) -> int:
    return min(128, max(16, int(triton.next_power_of_2(channels))))


def _like(x: Tensor) -> Tensor:
    """An empty tensor of x's shape and type, channels last and dense whatever x is a slice of."""
    return x.new_empty(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)


def _rows(x: Tensor) -> Rows:
    rows = rows_of(x)
    assert rows is not None, "not in rows: ask `serves` first"
    return rows


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def _moments_of_parts(
    x, stride, rows, channels, share, parts_K2C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Mean and M2 of the rows of one part, less the first row: values near 1e3 would not fit float32's digits."""
    part = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = column < channels
    shift_C = tl.load(x + column, mask=is_channel, other=0.0).to(tl.float32)
    # Each lane (a row of the tile) goes down its own rows as Welford 1962; they are merged at the end.
    count_M = tl.zeros((BLOCK_M, 1), tl.float32)
    mean_MC = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    m2_MC = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    last = tl.minimum((part + 1) * share, rows)
    for start in range(part * share, last, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)[:, None]
        is_value = (row < last) & is_channel[None, :]
        value = tl.load(x + row.to(tl.int64) * stride + column[None, :], mask=is_value, other=0.0).to(tl.float32)
        value -= shift_C[None, :]
        count_M += tl.where(row < last, 1.0, 0.0)
        step = tl.where(is_value, value - mean_MC, 0.0)
        mean_MC += step * (1.0 / tl.maximum(count_M, 1.0))
        m2_MC += step * (value - mean_MC)
    count = tl.maximum(tl.sum(count_M, 0), 1.0)
    mean_C = tl.sum(mean_MC * count_M, 0) / count
    drift_MC = mean_MC - mean_C[None, :]
    m2_C = tl.sum(m2_MC + count_M * drift_MC * drift_MC, 0)
    at = parts_K2C + part * 2 * channels + column
    tl.store(at, mean_C, mask=is_channel)
    tl.store(at + channels, m2_C, mask=is_channel)


@_jit
def _moments_of_all(x, rows, channels, share, parts, parts_K2C, packet_P, BLOCK_C: tl.constexpr):
    """The parts' moments merged in their order, and the shift put back."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = column < channels
    shift_C = tl.load(x + column, mask=is_channel, other=0.0).to(tl.float64)
    count_C = tl.zeros((BLOCK_C,), tl.float64)
    mean_C = tl.zeros((BLOCK_C,), tl.float64)
    m2_C = tl.zeros((BLOCK_C,), tl.float64)
    for part in range(parts):
        at = parts_K2C + part * 2 * channels + column
        size = tl.minimum(rows - part * share, share).to(tl.float64)
        total_C = count_C + size
        step_C = tl.load(at, mask=is_channel, other=0.0).to(tl.float64) - mean_C
        mean_C += step_C * (size / total_C)
        m2_C += tl.load(at + channels, mask=is_channel, other=0.0).to(tl.float64)
        m2_C += step_C * step_C * (count_C * size / total_C)
        count_C = total_C
    tl.store(packet_P + 1 + column, shift_C + mean_C, mask=is_channel)
    tl.store(packet_P + 1 + channels + column, m2_C, mask=is_channel)
    tl.store(packet_P + column, count_C, mask=column == 0)


@_jit
def _statistics(
    rows_RP, stride, ranks, channels, eps, weight, running_mean, running_var, batches, momentum,
    mean, scale, invstd, count,
    AFFINE: tl.constexpr, TRACKS: tl.constexpr, CUMULATIVE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """normalization.statistics: the ranks' packets merged in their order, and running statistics but their count."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = column < channels
    count_C = tl.zeros((BLOCK_C,), tl.float64)
    mean_C = tl.zeros((BLOCK_C,), tl.float64)
    for rank in range(ranks):
        at = rows_RP + rank * stride
        size = tl.load(at)
        count_C += size
        mean_C += size * tl.load(at + 1 + column, mask=is_channel, other=0.0)
    least_C = tl.maximum(count_C, 1.0)
    mean_C = mean_C / least_C
    m2_C = tl.zeros((BLOCK_C,), tl.float64)
    for rank in range(ranks):
        at = rows_RP + rank * stride
        drift_C = tl.load(at + 1 + column, mask=is_channel, other=0.0) - mean_C
        m2_C += tl.load(at + 1 + channels + column, mask=is_channel, other=0.0) + tl.load(at) * drift_C * drift_C
    invstd_C = 1.0 / tl.sqrt(m2_C / least_C + eps)
    scale_C = invstd_C
    if AFFINE:
        scale_C = invstd_C * tl.load(weight + column, mask=is_channel, other=0.0).to(tl.float64)
    if TRACKS:
        share = momentum
        if CUMULATIVE:
            share = 1.0 / (tl.load(batches) + 1).to(tl.float64)
        share_C = tl.where(count_C > 0, share, 0.0)
        old_C = tl.load(running_mean + column, mask=is_channel, other=0.0).to(tl.float64)
        tl.store(running_mean + column, old_C + share_C * (mean_C - old_C), mask=is_channel)
        unbiased_C = m2_C / tl.maximum(count_C - 1.0, 1.0)
        old_C = tl.load(running_var + column, mask=is_channel, other=0.0).to(tl.float64)
        tl.store(running_var + column, old_C + share_C * (unbiased_C - old_C), mask=is_channel)
    tl.store(mean + column, mean_C, mask=is_channel)
    tl.store(scale + column, scale_C, mask=is_channel)
    tl.store(invstd + column, invstd_C, mask=is_channel)
    tl.store(count + column, count_C, mask=column == 0)


@_jit
def _normalize(
    x, x_stride, rows, channels, mean, scale, bias, y, y_stride,
    BIASED: tl.constexpr, RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """normalization.normalized."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = column < channels
    is_value = (row < rows) & is_channel[None, :]
    mean_C = tl.load(mean + column, mask=is_channel, other=0.0)
    scale_C = tl.load(scale + column, mask=is_channel, other=0.0)
    value = tl.load(x + row * x_stride + column[None, :], mask=is_value, other=0.0).to(tl.float32)
    value = (value - mean_C[None, :]) * scale_C[None, :]
    if BIASED:
        value += tl.load(bias + column, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    if RELU:
        value = tl.where(value <= 0.0, 0.0, value)  # not a maximum, which would hide NaN
    tl.store(y + row * y_stride + column[None, :], value, mask=is_value)


@_jit
def _sums_of_parts(
    dy, dy_stride, x, x_stride, rows, channels, share, mean, scale, bias, parts_K2C,
    BIASED: tl.constexpr, RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sums of g and of g (x - mean) over the rows of one part."""
    part = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = column < channels
    mean_C = tl.load(mean + column, mask=is_channel, other=0.0)
    scale_C = tl.load(scale + column, mask=is_channel, other=0.0)
    bias_C = tl.zeros((BLOCK_C,), tl.float32)
    if BIASED:
        bias_C = tl.load(bias + column, mask=is_channel, other=0.0).to(tl.float32)
    sum_g = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_g_deviation = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    last = tl.minimum((part + 1) * share, rows)
    for start in range(part * share, last, BLOCK_M):
        row = (start + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
        is_value = (row < last) & is_channel[None, :]
        deviation = tl.load(x + row * x_stride + column[None, :], mask=is_value, other=0.0).to(tl.float32)
        deviation -= mean_C[None, :]
        g = tl.load(dy + row * dy_stride + column[None, :], mask=is_value, other=0.0).to(tl.float32)
        if RELU:  # rounded as y is, so that the mask is the one of the forward pass
            y = (deviation * scale_C[None, :] + bias_C[None, :]).to(x.dtype.element_ty).to(tl.float32)
            g = tl.where(y <= 0.0, 0.0, g)
        sum_g += g
        sum_g_deviation += tl.where(is_value, g * deviation, 0.0)
    at = parts_K2C + part * 2 * channels + column
    tl.store(at, tl.sum(sum_g, 0), mask=is_channel)
    tl.store(at + channels, tl.sum(sum_g_deviation, 0), mask=is_channel)


@_jit
def _sums_of_all(parts_K2C, parts, channels, invstd, sums_2C, BLOCK_C: tl.constexpr):
    """The parts' sums added up in their order: those of g and of g xhat."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = column < channels
    sum_g_C = tl.zeros((BLOCK_C,), tl.float64)
    sum_g_deviation_C = tl.zeros((BLOCK_C,), tl.float64)
    for part in range(parts):
        at = parts_K2C + part * 2 * channels + column
        sum_g_C += tl.load(at, mask=is_channel, other=0.0).to(tl.float64)
        sum_g_deviation_C += tl.load(at + channels, mask=is_channel, other=0.0).to(tl.float64)
    invstd_C = tl.load(invstd + column, mask=is_channel, other=0.0)
    tl.store(sums_2C + column, sum_g_C, mask=is_channel)
    tl.store(sums_2C + channels + column, sum_g_deviation_C * invstd_C, mask=is_channel)


@_jit
def _differentiate(
    dy, dy_stride, x, x_stride, rows, channels, mean, scale, bias, invstd, count, totals_RP, totals_stride, ranks,
    dx, dx_stride,
    BIASED: tl.constexpr, RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """normalization.Backward.dx."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = column < channels
    is_value = (row < rows) & is_channel[None, :]
    mean_g_C = tl.zeros((BLOCK_C,), tl.float64)
    mean_g_xhat_C = tl.zeros((BLOCK_C,), tl.float64)
    for rank in range(ranks):
        at = totals_RP + rank * totals_stride + column
        mean_g_C += tl.load(at, mask=is_channel, other=0.0)
        mean_g_xhat_C += tl.load(at + channels, mask=is_channel, other=0.0)
    values = tl.maximum(tl.load(count), 1.0)
    invstd_C = tl.load(invstd + column, mask=is_channel, other=0.0)
    mean_C = tl.load(mean + column, mask=is_channel, other=0.0)
    scale_C = tl.load(scale + column, mask=is_channel, other=0.0)
    level_C = (mean_g_C / values).to(tl.float32)
    slope_C = (mean_g_xhat_C / values * invstd_C).to(tl.float32)
    deviation = tl.load(x + row * x_stride + column[None, :], mask=is_value, other=0.0).to(tl.float32)
    deviation -= mean_C[None, :]
    g = tl.load(dy + row * dy_stride + column[None, :], mask=is_value, other=0.0).to(tl.float32)
    if RELU:
        y = deviation * scale_C[None, :]
        if BIASED:
            y += tl.load(bias + column, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        g = tl.where(y.to(x.dtype.element_ty).to(tl.float32) <= 0.0, 0.0, g)
    value = scale_C[None, :] * (g - level_C[None, :] - slope_C[None, :] * deviation)
    tl.store(dx + row * dx_stride + column[None, :], value, mask=is_value)
