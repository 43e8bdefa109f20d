"""What synchronized statistics cost BN-Inception, form beside form: exchanges, bytes, time in them, time of the step.

All forms train the same weights on the same images, step after step in turn, over a process group that is
there already (torchrun, srun, or namespaces on a slow network) or made of processes of this machine.
torch's own layer refuses the CPU; there its form is emulated in plain operations, collective by collective.
On a GPU a rank does not stand in an exchange, so that the step alone tells what it costs.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import models
from pipeline.benchmarks.passes import passes
from pipeline.norm import SyncBatchNorm, collectives
from pipeline.norm.sync_batch_norm import Level

LOCAL, TORCH, REDUCED, LAYERS, LEVELS, OVERLAP = FORMS = (
    "local", "torch's form", "layer all-reduce", "layer", "level", "level overlapped",
)  # fmt: skip
_CLASSES = 100
_CPU = torch.device("cpu")


@dataclass(slots=True)
class Traffic:
    """What a rank's statistics did in one step. seconds: that it stood in exchanges, waiting for others included."""

    exchanges: int = 0
    numbers: int = 0  # that this rank contributed
    seconds: float = 0.0


@dataclass(slots=True)
class Form:
    """One way to synchronize, and what its steps were after a first one. gradient: of one step in float64.

    passes: how often a layer with its ReLU reads and writes its activation, forward and backward.
    """

    name: str
    passes: int = 0
    steps: list[float] = field(default_factory=list)  # seconds
    traffic: list[Traffic] = field(default_factory=list)
    gradient: Tensor | None = None


class TorchFormNorm(nn.Module):
    """nn.SyncBatchNorm's collectives in operations that a CPU has: one all-gather forward, one all-reduce backward."""

    def __init__(self, num_features: int, eps: float = 1e-3):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _TorchForm.apply(x, self.weight, self.bias, self.eps)
        return y


class _TorchForm(torch.autograd.Function):
    """torch/nn/modules/_functions.py of 2.13, its five CUDA operations written out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        count = x.numel() // x.shape[1]
        variance, mean = torch.var_mean(x, (0, 2, 3), unbiased=False)
        packet = torch.cat([mean, (variance + eps).rsqrt(), mean.new_full((1,), count)])
        packets = [torch.empty_like(packet) for _ in range(dist.get_world_size())]
        with _timed(packet.numel()):
            dist.all_gather(packets, packet)
        means, invstds, counts = torch.split(torch.stack(packets), [len(mean), len(mean), 1], 1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        variances = invstds.pow(-2) - eps
        variance = ((variances + (means - mean).square()) * counts).sum(0) / total
        invstd = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, invstd, total)
        y: Tensor = (x - mean.view(1, -1, 1, 1)) * (invstd * weight).view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, total = ctx.saved_tensors
        deviation = x - mean.view(1, -1, 1, 1)
        sum_dy, sum_dy_xmu = dy.sum((0, 2, 3)), (dy * deviation).sum((0, 2, 3))
        packet = torch.cat([sum_dy, sum_dy_xmu])
        with _timed(packet.numel()):
            dist.all_reduce(packet)
        mean_dy, mean_dy_xmu = (packet / total).chunk(2)
        slope = (mean_dy_xmu * invstd.square()).view(1, -1, 1, 1)
        dx = (dy - mean_dy.view(1, -1, 1, 1) - deviation * slope) * (invstd * weight).view(1, -1, 1, 1)
        return dx, sum_dy_xmu * invstd, sum_dy, None


class _OneByOne(SyncBatchNorm):
    """Ours without levels."""

    begin_level = None  # type: ignore[assignment]


class _InLine(SyncBatchNorm):
    """Ours with levels, each waited for where it begins, and no gradient put off."""

    @staticmethod
    def begin_level(
        layers: Sequence[SyncBatchNorm],
        xs: Sequence[Tensor],
        followers: Sequence[nn.Conv2d] = (),
        activation: str | None = None,
    ) -> Level:
        level = SyncBatchNorm.begin_level(layers, xs, (), activation)
        ys = level.finish()
        level.finish = lambda places=(): ys  # type: ignore[method-assign]
        return level


_FACTORIES: dict[str, Callable[[int], nn.Module]] = {
    LOCAL: partial(SyncBatchNorm, group_size=1),
    TORCH: TorchFormNorm,
    REDUCED: _OneByOne,
    LAYERS: _OneByOne,
    LEVELS: _InLine,
    OVERLAP: SyncBatchNorm,
}


def compare(
    *,
    images: int,
    size: int,
    repeats: int,
    width: float = 1.0,
    only: Sequence[str] = (),
    device: torch.device = _CPU,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Form]:
    """Train `repeats` steps of each form after a first one, on `images` of `size` pixels a rank. A collective.

    On a GPU in bf16 (mixed), and torch's form is its own layer.
    """
    torch.manual_seed(0)
    factories = _FACTORIES | ({TORCH: partial(nn.SyncBatchNorm, eps=1e-3)} if device.type == "cuda" else {})
    networks = {name: models.build("bn_inception", num_classes=_CLASSES, norm=factories[name], width=width).to(device)
                for name in only or FORMS}  # fmt: skip
    weights = next(iter(networks.values())).state_dict()
    for network in networks.values():
        network.load_state_dict(weights)
        network.to(memory_format=torch.channels_last)
    trained = {name: _distributed(network) for name, network in networks.items()}
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    x_NCHW = torch.randn(images, 3, size, size, generator=generator).to(device, memory_format=torch.channels_last)
    label_N = torch.randint(_CLASSES, (images,), generator=generator).to(device)
    forms = [Form(name, _passes(name, device)) for name in networks]
    for form in forms:
        form.gradient = _exact_gradient(form, networks[form.name], x_NCHW, label_N)
    for repeat in range(repeats + 1):
        for form in forms:
            seconds, traffic = _step(form, trained[form.name], x_NCHW, label_N)
            if repeat:
                form.steps.append(seconds)
                form.traffic.append(traffic)
            progress(repeat * len(forms) + forms.index(form) + 1, (repeats + 1) * len(forms))
    return forms


def report(forms: Sequence[Form]) -> Table:
    """Medians and quartiles over steps of this rank; the ratio is of torch's form."""
    title = f"BN-Inception, {dist.get_world_size()} ranks, n = {len(forms[0].steps)}; median (quartiles) of rank 0"
    table = Table("form", "passes", "exchanges", "KB sent", "ms an exchange", "ms in statistics", "of torch's",
                  "ms a step", "of torch's", "gradients differ by", title=title, title_justify="left")  # fmt: skip
    torch_form = next((form for form in forms if form.name == TORCH), None)
    for form in forms:
        traffic = form.traffic[-1]
        waits = [each.seconds for each in form.traffic]
        each = f"{statistics.median(waits) / traffic.exchanges * 1e3:.1f}" if traffic.exchanges else ""
        sent = f"{traffic.numbers * (4 if form is torch_form else 8) / 1e3:.0f}"
        row = [form.name, str(form.passes), str(traffic.exchanges), sent, each]
        for values, theirs in ((waits, [t.seconds for t in torch_form.traffic] if torch_form else []),
                               (form.steps, torch_form.steps if torch_form else [])):  # fmt: skip
            row.append(_spread(values))
            row.append(f"{statistics.median(values) / statistics.median(theirs):.3f}" if any(theirs) else "")
        table.add_row(*row, _difference(form, torch_form))
    return table


def _passes(name: str, device: torch.device) -> int:
    """Reads and writes; of the kernels and of torch's own CUDA operations what their sources say."""
    if device.type == "cuda":  # a ReLU apart is 5 of them
        return 13 if name == TORCH or _FACTORIES[name] is _OneByOne else 8
    layer = _FACTORIES[name](16)
    return sum(passes(lambda x: torch.relu(layer(x)), torch.randn(8, 16, 6, 6)))


def _distributed(network: nn.Module) -> nn.Module:
    if dist.get_world_size() == 1:
        return network
    return DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)


def _exact_gradient(form: Form, network: nn.Module, x_NCHW: Tensor, label_N: Tensor) -> Tensor:
    """All of one step's gradient over all ranks, in float64, in which no form may differ from another."""
    exact = _distributed(copy.deepcopy(network).double())
    _step(form, exact, x_NCHW.double(), label_N)
    return torch.cat([p.grad.flatten() for p in exact.parameters() if p.grad is not None])


def _step(form: Form, network: nn.Module, x_NCHW: Tensor, label_N: Tensor) -> tuple[float, Traffic]:
    """Forward and backward, with the seconds of both."""
    limit, collectives.GATHER_LIMIT = collectives.GATHER_LIMIT, 0 if form.name == REDUCED else collectives.GATHER_LIMIT
    network.zero_grad(set_to_none=True)
    on_gpu = x_NCHW.is_cuda
    dist.barrier()
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    try:
        with _counted() as traffic:
            with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu and x_NCHW.dtype == torch.float32):
                logits_NK = network(x_NCHW).main_NK
                loss = nn.functional.cross_entropy(logits_NK, label_N)
            loss.backward()  # type: ignore[no-untyped-call]
        if on_gpu:
            torch.cuda.synchronize()
            traffic.seconds = 0.0  # the host's, which does not wait
    finally:
        collectives.GATHER_LIMIT = limit
    return time.perf_counter() - began, traffic


@dataclass(slots=True)
class Watch:
    """Whose traffic is counted at the moment."""

    traffic: Traffic = field(default_factory=Traffic)


_WATCH = Watch()


@contextmanager
def _timed(numbers: int) -> Iterator[None]:
    """One exchange, waited for."""
    traffic = _WATCH.traffic
    traffic.exchanges += 1
    traffic.numbers += numbers
    began = time.perf_counter()
    try:
        yield
    finally:
        traffic.seconds += time.perf_counter() - began


@contextmanager
def _counted() -> Iterator[Traffic]:
    """Watch the exchanges of our layers, and collect those of torch's form."""
    traffic = _WATCH.traffic = Traffic()
    group = collectives.StatisticsGroup
    begin = {name: getattr(group, name) for name in ("_begin_gather", "_begin_reduce")}

    def watched(name: str) -> Callable[..., Callable[[], Tensor]]:
        def started(self: Any, packet_P: Tensor) -> Callable[[], Tensor]:
            began = time.perf_counter()
            arrived = begin[name](self, packet_P)
            traffic.seconds += time.perf_counter() - began

            def waited() -> Tensor:
                with _timed(packet_P.numel()):
                    result: Tensor = arrived()
                return result

            return waited

        return started

    for name in begin:
        setattr(group, name, watched(name))
    try:
        yield traffic
    finally:
        for name, original in begin.items():
            setattr(group, name, original)


def _difference(form: Form, other: Form | None) -> str:
    """Between gradients, in units of the largest entry."""
    if other is None or form is other or form.gradient is None or other.gradient is None:
        return ""
    scale = other.gradient.abs().max()
    return f"{(form.gradient - other.gradient).abs().max() / scale:.0e}"


def _spread(values: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle * 1e3:.0f} ({low * 1e3:.0f}-{high * 1e3:.0f})"


def join(processes: int, device: torch.device = _CPU) -> bool:
    """Join the group that a launcher has described; False where there is none and it takes more than this process."""
    if "RANK" not in os.environ:
        if processes > 1:
            return False
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    backend = "gloo"
    if device.type == "cuda":
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        torch.cuda.set_device(local % gpus)
        backend = "nccl" if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= gpus else "gloo"  # NCCL wants one each
    dist.init_process_group(backend)
    return True
