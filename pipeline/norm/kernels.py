"""Triton kernels of batch normalization on rows of channels; `fused` calls them and says what they are for.

Sums are made in parts whose number depends on the shape alone and merged in their order in float64, so bits repeat
on every device of a type. Rows may be any distance apart.
Legend: M rows of a tile, C channels, K parts, R ranks, P = 2C + 1 numbers of a packet (moments.py). g: dy where the
ReLU behind it was not flat.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch without it, as for the CPU alone
    triton = None

IS_THERE = triton is not None


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def moments_of_parts(
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
def moments_of_all(x, rows, channels, share, parts, parts_K2C, packet_P, BLOCK_C: tl.constexpr):
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
def statistics(
    rows_RP, stride, ranks, channels, weight, running_mean, running_var, batches, mean, scale, invstd, count,
    EPS: tl.constexpr, MOMENTUM: tl.constexpr,
    AFFINE: tl.constexpr, TRACKS: tl.constexpr, CUMULATIVE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """normalization.statistics: the ranks' packets merged in their order, and running statistics but their count.

    EPS and MOMENTUM are constants because a number that is handed over would be a float32.
    """
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
    invstd_C = 1.0 / tl.sqrt(m2_C / least_C + EPS)
    scale_C = invstd_C
    if AFFINE:
        scale_C = invstd_C * tl.load(weight + column, mask=is_channel, other=0.0).to(tl.float64)
    if TRACKS:
        share_C = tl.zeros((BLOCK_C,), tl.float64) + MOMENTUM
        if CUMULATIVE:
            share_C = 1.0 / (tl.zeros((BLOCK_C,), tl.float64) + tl.load(batches).to(tl.float64) + 1.0)
        share_C = tl.where(count_C > 0, share_C, 0.0)
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
def normalize(
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
def sums_of_parts(
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
def sums_of_all(parts_K2C, parts, channels, invstd, sums_2C, BLOCK_C: tl.constexpr):
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
def coefficients(totals_RP, stride, ranks, channels, invstd, count, level, slope, BLOCK_C: tl.constexpr):
    """mean(g) and mean(g xhat) / std over the group, the ranks' sums added up in their order."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = column < channels
    sum_g_C = tl.zeros((BLOCK_C,), tl.float64)
    sum_g_xhat_C = tl.zeros((BLOCK_C,), tl.float64)
    for rank in range(ranks):
        at = totals_RP + rank * stride + column
        sum_g_C += tl.load(at, mask=is_channel, other=0.0)
        sum_g_xhat_C += tl.load(at + channels, mask=is_channel, other=0.0)
    values = tl.maximum(tl.load(count), 1.0)
    invstd_C = tl.load(invstd + column, mask=is_channel, other=0.0)
    tl.store(level + column, sum_g_C / values, mask=is_channel)
    tl.store(slope + column, sum_g_xhat_C / values * invstd_C, mask=is_channel)


@_jit
def differentiate(
    dy, dy_stride, x, x_stride, rows, channels, mean, scale, bias, level, slope, dx, dx_stride,
    BIASED: tl.constexpr, RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """normalization.Backward.dx."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = column < channels
    is_value = (row < rows) & is_channel[None, :]
    mean_C = tl.load(mean + column, mask=is_channel, other=0.0)
    scale_C = tl.load(scale + column, mask=is_channel, other=0.0)
    level_C = tl.load(level + column, mask=is_channel, other=0.0)
    slope_C = tl.load(slope + column, mask=is_channel, other=0.0)
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
