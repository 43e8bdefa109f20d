"""torch.compile takes a step whole: no graph break, the same numbers, and each level's exchange in the graph."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn

from pipeline import models
from pipeline.models.blocks import Inception, Style, Unit, Widths
from pipeline.norm import SyncBatchNorm
from tests.multiprocess.ranks import run_ranks, with_group


class Network(nn.Module):
    """An opening unit and one module: 4 levels of 8 norms."""

    def __init__(self, group_size: int):
        super().__init__()
        style = Style(partial(SyncBatchNorm, group_size=group_size))
        self.opening = Unit(3, 8, 3, style)
        self.module = Inception(8, Widths(4, 4, 6, 3, 5, "avg", 4), style)
        self.classifier = nn.Linear(self.module.outputs, 5)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        logits_NK: torch.Tensor = self.classifier(self.module(self.opening(x_NCHW))[0].mean((2, 3)))
        return logits_NK


def trained(network: nn.Module, forward, sizes: tuple[int, ...], rank: int, steps: int) -> list[torch.Tensor]:
    """Loss, gradients and statistics after some steps."""
    generator = torch.Generator().manual_seed(rank)
    x_NCHW = torch.randn(sizes[rank], 3, 32, 32, generator=generator) * 2 + 9
    x_NCHW = x_NCHW.to(next(network.parameters()).dtype)
    label_N = torch.arange(sizes[rank]) % 5
    loss = torch.zeros(())
    for _ in range(steps):
        loss = nn.functional.cross_entropy(forward(x_NCHW), label_N, reduction="sum")
        loss.backward()
    return [loss, *(p.grad for p in network.parameters()), *network.buffers()]


def rank_of_traced(rank, world, sizes, group_size):
    """Traced by the compiler's front, run operation by operation; and what the graphs hold."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[Counter[str]] = []

    def kept(module, inputs):
        graphs.append(Counter(str(node.target) for node in module.graph.nodes if node.op == "call_function"))
        return make_boxed_func(module.forward)

    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        network = Network(group_size)
        backend = aot_autograd(fw_compiler=kept, bw_compiler=kept)
        forward = torch.compile(network, fullgraph=True, backend=backend) if compiled else network
        results.append([value.detach().numpy() for value in trained(network, forward, sizes, rank, 2)])
    return results, graphs


@pytest.mark.parametrize(("sizes", "group_size", "exchanges"), [((3, 4), 0, 4), ((0, 5), 0, 4), ((2, 3), 1, 0)])
def test_a_traced_step_is_the_step(sizes, group_size, exchanges):
    for (plain, traced), graphs in run_ranks(2, with_group, rank_of_traced, sizes, group_size):
        for expected, value in zip(plain, traced, strict=True):
            assert expected.tobytes() == value.tobytes()
        assert len(graphs) == 2  # one forward, one backward: nothing broke the step in two
        for graph in graphs:
            assert graph["_c10d_functional.all_gather_into_tensor.default"] == exchanges
            assert not [
                name for name in graph if any(read in name for read in ("nonzero", "scalar_dense", "aten.item"))
            ]


def rank_of_compiled(rank, world, whole):
    """By inductor, the compiler's back, which fuses and orders operations itself."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        network = models.build("bn_inception", num_classes=5, norm=SyncBatchNorm, stem="small", width=0.25) if whole \
            else Network(0)  # fmt: skip
        network.double()

        def forward(x_NCHW, network=network):
            return network(x_NCHW).main_NK if whole else network(x_NCHW)

        step = torch.compile(forward, fullgraph=True) if compiled else forward
        results.append([value.detach().numpy() for value in trained(network, step, (3, 4), rank, 2)])
    return results


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_step_has_the_same_numbers(whole):
    """In float64, of whose digits another order of sums costs the last few."""
    for plain, compiled in run_ranks(2, with_group, rank_of_compiled, whole, seconds=1500):
        for expected, value in zip(plain, compiled, strict=True):
            assert abs(expected - value).max(initial=0) <= 1e-8 * max(1e-3, abs(expected).max(initial=0))
