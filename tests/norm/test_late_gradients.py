"""Weights' gradients that are computed later are the same gradients, and nothing else waits for them."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import models
from pipeline.norm import SyncBatchNorm
from pipeline.norm.collectives import StatisticsGroup
from pipeline.norm.late_gradients import LateGradients
from tests.multiprocess.ranks import run_ranks, with_group


class Asked(torch.autograd.Function):
    """Stands where the norm does: before the convolutions, with their weights as inputs."""

    @staticmethod
    def forward(ctx, x, late, *weights):
        ctx.late = late
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return dx, None, *ctx.late.gradients()


def gradients(convs: list[nn.Conv2d], x: torch.Tensor, *, late: bool) -> list[torch.Tensor | None]:
    x = x.clone().requires_grad_()
    put_off = LateGradients(convs if late else [])
    entered = Asked.apply(x, put_off, *put_off.weights)
    total = sum(put_off.convolve(conv, entered).square().mean() for conv in convs[:2])
    total.backward()
    found = [x.grad, *(conv.weight.grad for conv in convs)]
    for conv in convs:
        conv.weight.grad = None
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("channels_last", [False, True])
def test_late_gradients_have_the_bits_of_autograds(dtype, channels_last):
    torch.manual_seed(0)
    convs = [nn.Conv2d(6, 8, 3, padding=1, stride=2, bias=False), nn.Conv2d(6, 4, 1, bias=False, groups=2),
             nn.Conv2d(6, 4, 1, bias=False)]  # fmt: skip
    convs = [conv.to(dtype) for conv in convs]
    x = torch.randn(3, 6, 7, 7, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    now, later = (gradients(convs, x, late=late) for late in (False, True))
    assert later[3] is None  # the third is never run
    for left, right in zip(now[:3], later[:3], strict=True):
        assert torch.equal(left, right)


def test_under_autocast_weights_get_gradients_in_their_own_type():
    torch.manual_seed(0)
    convs = [nn.Conv2d(6, 8, 3, bias=False), nn.Conv2d(6, 4, 1, bias=False)]
    x = torch.randn(3, 6, 7, 7)
    with torch.autocast("cpu", torch.bfloat16):
        now, later = (gradients(convs, x, late=late) for late in (False, True))
    for left, right in zip(now, later, strict=True):
        assert left.dtype == right.dtype == torch.float32
        torch.testing.assert_close(left, right, rtol=2e-2, atol=1e-4)


def test_a_convolution_with_a_bias_or_of_another_kind_keeps_its_backward():
    conv, x = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular", bias=False), torch.randn(2, 3, 5, 5)
    assert torch.equal(LateGradients([conv]).convolve(conv, x), conv(x))
    other = nn.Sequential(conv)
    assert torch.equal(LateGradients([conv]).convolve(other, x), conv(x))


class InLine(SyncBatchNorm):
    """Exchanges where they begin, and puts nothing off."""

    @staticmethod
    def begin_level(layers, xs, followers=(), activation=None):
        level = SyncBatchNorm.begin_level(layers, xs, (), activation)
        ys = level.finish()
        level.finish = lambda places=(): ys
        return level


def rank_of_network(rank, world, norm, wrapped):
    torch.manual_seed(0)
    model = models.build("bn_inception", num_classes=7, norm=norm, stem="small", width=0.125).double()
    model = DistributedDataParallel(model) if wrapped else model
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(2 + rank, 3, 24, 24, generator=generator, dtype=torch.float64)
    for _ in range(2):
        model.zero_grad()
        model(x).main_NK.square().sum().backward()
    return [p.grad.numpy() for p in model.parameters()]


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_network_has_the_same_gradients_with_and_without_overlap(wrapped):
    overlapped, in_line = (run_ranks(2, with_group, rank_of_network, norm, wrapped) for norm in (SyncBatchNorm, InLine))
    for left, right in zip(overlapped, in_line, strict=True):
        assert len(left) == 69 * 3 + 2  # a convolution and its norm's two; and the last layer's two
        for a, b in zip(left, right, strict=True):
            torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b), rtol=1e-12, atol=1e-12)


def rank_of_order(rank, world):
    """What happens in the backward of one step, in its order."""
    happened: list[str] = []
    begin, weigh = StatisticsGroup.begin_sum, LateGradients.gradients

    def begun(self, packet):
        happened.append("begin")
        arrived = begin(self, packet)
        return lambda: (happened.append("arrived"), arrived())[1]

    def weighed(self):
        halves = len(self._halves)
        found = weigh(self)
        happened.append(f"{halves} weights")
        return found

    StatisticsGroup.begin_sum, LateGradients.gradients = begun, weighed
    rank_of_network(rank, world, SyncBatchNorm, False)
    return happened[: len(happened) // 2]


def test_every_exchange_of_the_backward_runs_beside_the_weights_of_what_follows():
    for happened in run_ranks(2, with_group, rank_of_order):
        first, rest = happened[:2], happened[2:]
        assert first == ["begin", "arrived"]  # behind the last module is no convolution
        assert len(rest) == 32 * 3
        assert [rest[i : i + 3 : 2] for i in range(0, 96, 3)] == [["begin", "arrived"]] * 32
        weights = [int(text.split()[0]) for text in rest[1::3]]
        assert min(weights) >= 1
        assert sum(weights) == 68  # all but the opening one, before which nothing is normalized
