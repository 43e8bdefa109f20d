"""What batch normalization with a ReLU behind it costs a layer, on the shapes of BN-Inception: ours and torch's.

Time of forward and backward in turn within one run, and bandwidth: the bytes of the eight passes over the activation
that our kernels make (moments 1, normalize 2, sums 2, dx 3), over that time, for every contender alike.
Legend: N images, C channels, H, W pixels.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncFunction

from pipeline import models
from pipeline.norm import SyncBatchNorm, fused

PASSES = 8
OURS, PLAIN, EAGER = "ours, fused", "ours, plain", "F.batch_norm, relu"
COMPILED, SYNC = "the same compiled", "nn.SyncBatchNorm"
ONE_PIXEL = 32  # pixels a side up to which the last module's grid is a single one
_WARM = 3

Shape = tuple[int, int, int]  # C, H, W
Run = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class Layer:
    """One shape, how many layers of the network have it, and each contender's seconds."""

    shape_CHW: Shape
    layers: int
    seconds: dict[str, list[float]] = field(default_factory=dict)


class _Recorder(nn.Module):
    """A norm that notes what comes by."""

    def __init__(self, channels: int, seen: list[Shape]):
        super().__init__()
        self.seen = seen

    def forward(self, x_NCHW: Tensor) -> Tensor:
        self.seen.append((x_NCHW.shape[1], x_NCHW.shape[2], x_NCHW.shape[3]))
        return x_NCHW


def shapes_of_network(size: int) -> Mapping[Shape, int]:
    """What the 69 norms of BN-Inception are given for images of so many pixels a side, and how often."""
    seen: list[Shape] = []
    with torch.device("meta"):
        network = models.build("bn_inception", num_classes=2, norm=partial(_Recorder, seen=seen))
        network(torch.empty(1, 3, size, size))
    return Counter(seen)


def measure(
    *,
    images: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Layer]:
    """Every contender on every shape, `repeats` times after three that do not count."""
    found = [Layer(shape, layers) for shape, layers in shapes_of_network(size).items()]
    for number, layer in enumerate(found):
        torch._dynamo.reset()  # else the compiled one would give up after eight shapes
        channels, height, width = layer.shape_CHW
        generator = torch.Generator(device).manual_seed(0)
        x_NCHW, dy_NCHW = (
            torch.randn(images, channels, height, width, generator=generator, device=device, dtype=dtype)
            .contiguous(memory_format=torch.channels_last) for _ in range(2)
        )  # fmt: skip
        contenders = _contenders(channels, x_NCHW)
        layer.seconds = {name: [] for name in contenders}
        for repeat in range(_WARM + repeats):
            for name, run in contenders.items():
                seconds = _seconds(run, x_NCHW, dy_NCHW)
                if repeat >= _WARM:
                    layer.seconds[name].append(seconds)
        progress(number + 1, len(found))
    return found


def report(found: Sequence[Layer], *, images: int, dtype: torch.dtype) -> Table:
    """Median ms and GB/s of each shape, and of all 69 layers together."""
    names = list(found[0].seconds)
    n = len(found[0].seconds[names[0]])
    title = f"BN + ReLU: {images} images, {str(dtype)[6:]}, forward and backward, n = {n}; median ms (GB/s)"
    table = Table("C x H x W", "layers", *names, title=title, title_justify="left")
    sums = dict.fromkeys(names, 0.0)
    total = 0
    for layer in found:
        channels, height, width = layer.shape_CHW
        moved = PASSES * images * channels * height * width * dtype.itemsize
        total += moved * layer.layers
        cells = []
        for name in names:
            median = statistics.median(layer.seconds[name])
            sums[name] += median * layer.layers
            cells.append(f"{median * 1e3:.3f} ({moved / median / 1e9:,.0f})")
        table.add_row(f"{channels} x {height} x {width}", str(layer.layers), *cells)
    table.add_section()
    table.add_row("all", str(sum(layer.layers for layer in found)),
                  *(f"{sums[name] * 1e3:.2f} ({total / sums[name] / 1e9:,.0f})" for name in names))  # fmt: skip
    return table


@functools.cache
def why_not_compiled(device: torch.device) -> str:
    """Why torch.compile does not work here, in a line; "" if it does. It needs g++ on a CPU, and Triton on a GPU."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(2, device=device))
    except Exception as error:  # the compiler's back has many ways to miss something
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
    return ""


def _contenders(channels: int, x_NCHW: Tensor) -> dict[str, Run]:
    device = x_NCHW.device
    ours = SyncBatchNorm(channels, activation="relu", group_size=1).to(device)
    weight_C = torch.ones(channels, device=device, requires_grad=True)
    bias_C = torch.zeros(channels, device=device, requires_grad=True)
    mean_C, variance_C = torch.zeros(channels, device=device), torch.ones(channels, device=device)

    def eager(x: Tensor) -> Tensor:
        return nn.functional.relu(nn.functional.batch_norm(x, mean_C, variance_C, weight_C, bias_C, training=True))

    def synchronized(x: Tensor) -> Tensor:
        y: Tensor = TorchSyncFunction.apply(x, weight_C, bias_C, mean_C, variance_C, 1e-3, 0.1, dist.group.WORLD, 1)
        return nn.functional.relu(y)

    contenders: dict[str, Run] = {OURS if fused.serves(x_NCHW) else PLAIN: ours, EAGER: eager}
    if not why_not_compiled(device):
        contenders[COMPILED] = torch.compile(eager, dynamic=False)
    if x_NCHW.is_cuda and dist.is_initialized() and dist.get_world_size() == 1:
        contenders[SYNC] = synchronized  # it refuses the CPU; one rank exchanges nothing, and has its other costs
    return contenders


def _seconds(run: Run, x_NCHW: Tensor, dy_NCHW: Tensor) -> float:
    """One forward and backward. On a GPU by its own clock, so that launches count where they hold it up."""
    x_NCHW = x_NCHW.detach().requires_grad_()
    if x_NCHW.is_cuda:
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run(x_NCHW).backward(dy_NCHW)  # type: ignore[no-untyped-call]
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    began = time.perf_counter()
    run(x_NCHW).backward(dy_NCHW)  # type: ignore[no-untyped-call]
    return time.perf_counter() - began
