"""Layers of a level, taken together with one exchange, are the layers one by one, and batch norm of the whole group."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.norm import SyncBatchNorm
from tests.multiprocess.ranks import run_ranks, with_group

WIDTHS = (4, 7, 1)
SIDES = (3, 2, 5)  # each layer of a level has its own number of values


def inputs(images: int, *, offset: float = 0.0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(images, width, side, side, generator=generator, dtype=torch.float64) + offset).to(dtype)
            for width, side in zip(WIDTHS, SIDES, strict=True)]  # fmt: skip


def layers(*, affine: bool, group_size: int = 0, dtype: torch.dtype = torch.float64) -> list[SyncBatchNorm]:
    made = []
    for number, width in enumerate(WIDTHS):
        layer = SyncBatchNorm(width, affine=affine, group_size=group_size).to(dtype)
        if affine:
            nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(number))
            nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(number + 9))
        made.append(layer)
    return made


def weighted(ys: list[torch.Tensor], first: int, whole: int) -> torch.Tensor:
    """A sum in which each value of each image counts otherwise."""
    total = ys[0].new_zeros(())
    for y in ys:
        weight = torch.randn(whole, *y.shape[1:], generator=torch.Generator().manual_seed(11), dtype=torch.float64)
        total = total + (y * weight[first : first + len(y)].to(y.dtype)).sum()
    return total


def results(made: list[SyncBatchNorm] | list[nn.BatchNorm2d], xs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {f"dx{i}": x.grad for i, x in enumerate(xs)}
    for i, layer in enumerate(made):
        found |= {f"{name}{i}": buffer for name, buffer in layer.named_buffers()}
        found |= {f"d{name}{i}": p.grad for name, p in layer.named_parameters()}
    return found


def rank_of_level(rank, world, sizes, how, affine, channels_last, group_size, offset, dtype):
    first, end = sum(sizes[:rank]), sum(sizes[: rank + 1])
    xs = [x[first:end] for x in inputs(sum(sizes), offset=offset, dtype=dtype)]
    if channels_last:
        xs = [x.contiguous(memory_format=torch.channels_last) for x in xs]
    for x in xs:
        x.requires_grad_()
    made = layers(affine=affine, group_size=group_size, dtype=dtype)
    if how == "level":
        ys = SyncBatchNorm.forward_level(made, xs)
    elif how == "checkpointed":
        ys = checkpoint(lambda *x: tuple(SyncBatchNorm.forward_level(made, x)), *xs, use_reentrant=False)
    else:
        ys = [layer(x) for layer, x in zip(made, xs, strict=True)]
    weighted(ys, first, sum(sizes)).backward()
    found = results(made, xs) | {f"y{i}": y.detach() for i, y in enumerate(ys)}
    return {name: value.numpy() for name, value in found.items()}


def of_ranks(sizes, how, *, affine=True, channels_last=False, group_size=0, offset=0.0, dtype=torch.float64):
    arguments = (sizes, how, affine, channels_last, group_size, offset, dtype)
    found = run_ranks(len(sizes), with_group, rank_of_level, *arguments)
    return [{name: torch.from_numpy(value) for name, value in each.items()} for each in found]


def of_torch(sizes, *, affine=True, offset=0.0, dtype=torch.float64):
    """nn.BatchNorm2d on all images at once."""
    xs = [x.requires_grad_() for x in inputs(sum(sizes), offset=offset, dtype=dtype)]
    made = []
    for layer in layers(affine=affine, dtype=dtype):
        theirs = nn.BatchNorm2d(layer.num_features, eps=1e-3, affine=affine).to(dtype)
        theirs.load_state_dict(layer.state_dict())
        made.append(theirs)
    ys = [layer(x) for layer, x in zip(made, xs, strict=True)]
    weighted(ys, 0, sum(sizes)).backward()
    return results(made, xs) | {f"y{i}": y.detach() for i, y in enumerate(ys)}


def check(ranks, whole, **tolerance):
    for name, value in whole.items():
        parts = [rank[name] for rank in ranks]
        if name.startswith(("y", "dx")):
            torch.testing.assert_close(torch.cat(parts), value, **tolerance, msg=name)
        elif name.startswith("d"):
            torch.testing.assert_close(torch.stack(parts).sum(0), value, **tolerance, msg=name)
        else:
            for part in parts:
                torch.testing.assert_close(part, value, **tolerance, msg=name)


@pytest.mark.parametrize("how", ["level", "one by one", "checkpointed"])
@pytest.mark.parametrize(("sizes", "affine", "channels_last"),
                         [((5,), True, False), ((7, 2, 0), True, True), ((0, 0, 5), False, False),
                          ((2, 3), False, True), ((1, 2, 0, 3), True, False)])  # fmt: skip
def test_a_level_equals_batch_norm_of_the_whole_batch(how, sizes, affine, channels_last):
    ranks = of_ranks(sizes, how, affine=affine, channels_last=channels_last)
    check(ranks, of_torch(sizes, affine=affine), rtol=1e-11, atol=1e-12)


def test_a_level_has_the_bits_of_its_layers_one_by_one():
    together, apart = (of_ranks((3, 2, 1), how) for how in ("level", "one by one"))
    for left, right in zip(together, apart, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("how", ["level", "one by one"])
def test_groups_exchange_their_levels_apart(how):
    sizes = (3, 1, 0, 2)
    ranks = of_ranks(sizes, how, group_size=2)
    xs = inputs(6)
    for first, end, pair in ((0, 4, ranks[:2]), (4, 6, ranks[2:])):
        for i, layer in enumerate(layers(affine=True)):
            expected = SyncBatchNorm.forward(layer, xs[i][first:end])
            torch.testing.assert_close(torch.cat([r[f"y{i}"] for r in pair]), expected.detach(), rtol=1e-11, atol=1e-12)
            for rank in pair:
                torch.testing.assert_close(rank[f"running_var{i}"], layer.running_var, rtol=1e-11, atol=0)


def test_a_level_in_float32_is_accurate_at_mean_1e3():
    """Against float64 on the same values, of which float32 keeps 6e-5 near 1e3."""
    sizes = (4, 0, 3)
    ranks = of_ranks(sizes, "level", offset=1e3, dtype=torch.float32)
    xs = inputs(7, offset=1e3, dtype=torch.float32)
    for i, layer in enumerate(layers(affine=True)):
        expected = layer(xs[i].double())
        torch.testing.assert_close(torch.cat([r[f"y{i}"] for r in ranks]).double(), expected, rtol=0, atol=3e-4)
        variance = ranks[0][f"running_var{i}"].double()
        torch.testing.assert_close(variance, layer.running_var, rtol=1e-5, atol=0)


def test_layers_of_other_groups_or_modes_are_called_one_by_one():
    made = [SyncBatchNorm(3), SyncBatchNorm(3, group_size=1), SyncBatchNorm(3).eval()]
    xs = [torch.randn(4, 3, 2, 2) for _ in made]
    again = [SyncBatchNorm(3), SyncBatchNorm(3, group_size=1), SyncBatchNorm(3).eval()]
    for y, layer, x in zip(SyncBatchNorm.forward_level(made, xs), again, xs, strict=True):
        assert torch.equal(y, layer(x))


def rank_of_timeout(rank, world):
    from datetime import timedelta

    import torch.distributed as dist

    from pipeline.norm.collectives import statistics_group

    dist.init_process_group("gloo", timeout=timedelta(seconds=77))
    group = statistics_group(0).process_group
    seconds = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    dist.destroy_process_group()
    return seconds


def test_the_group_of_statistics_waits_as_long_as_the_world():
    assert run_ranks(2, rank_of_timeout) == [77.0, 77.0]
