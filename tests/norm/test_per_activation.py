"""A norm of single activations over any split of the images is the same over all of them, written out in float64."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from pipeline import models
from pipeline.models.blocks import Unit
from pipeline.norm import PerActivationNorm, SyncBatchNorm, convert, fold, fused, revert
from pipeline.norm.health import watch
from pipeline.norm.per_activation import PlainPerActivationNorm
from pipeline.norm.population import estimate
from pipeline.norm.preactivations import VALUES, Watch
from tests.multiprocess.ranks import run_ranks, with_group

PLACES = (3, 2, 4)  # C, H, W, all different
EPS = 1e-3


def images(n: int, seed: int = 0, places: tuple[int, int, int] = PLACES) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *places, generator=generator, dtype=torch.float64) * 2 + 3


def trained(**options) -> PerActivationNorm:
    layer = PerActivationNorm(PLACES, **options).double()
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, 24))
        layer.bias.copy_(torch.linspace(-1, 1, 24))
    return layer


def by_place(layer: nn.Module, name: str) -> torch.Tensor:
    """A tensor of a layer as (C, H, W), by its documented order: (y W + x) C + c."""
    vector = layer.get_parameter(name) if name in ("weight", "bias") else layer.get_buffer(name)
    channels, height, width = PLACES
    return torch.stack([torch.stack([torch.stack([vector[(y * width + x) * channels + c] for x in range(width)])
                                     for y in range(height)]) for c in range(channels)])  # fmt: skip


def written_out(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The formula of each activation over images, differentiable by torch's own rules."""
    mean = x.sum(0) / len(x)
    variance = (x - mean).square().sum(0) / len(x)
    return weight * (x - mean) / (variance + EPS).sqrt() + bias


def reference(n: int) -> dict[str, torch.Tensor]:
    layer, x = trained(), images(n).requires_grad_()
    weight, bias = (by_place(layer, name).detach().requires_grad_() for name in ("weight", "bias"))
    y = written_out(x, weight, bias)
    y.backward(images(n, seed=1))
    unbiased = x.detach().var(0, correction=1) if n > 1 else torch.zeros(PLACES, dtype=torch.float64)
    return {
        "y": y.detach(), "x": x.grad, "weight": weight.grad, "bias": bias.grad,
        "running_mean": 0.1 * x.detach().mean(0), "running_var": 0.9 + 0.1 * unbiased,
    }  # fmt: skip


def rank_of_split(rank, world, sizes, dtype, channels_last, group_size=0):
    layer = trained(group_size=group_size).to(dtype)
    first, end = sum(sizes[:rank]), sum(sizes[: rank + 1])
    x = images(sum(sizes))[first:end].to(dtype)
    x = (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    y = layer(x)
    y.backward(images(sum(sizes), seed=1)[first:end].to(dtype))
    grads = PlainPerActivationNorm(24, places=layer.places).to(dtype)
    grads.weight.data, grads.bias.data = layer.weight.grad, layer.bias.grad
    found = {"y": y, "x": x.grad, **{name: by_place(grads, name) for name in ("weight", "bias")}}
    found |= {name: by_place(layer, name) for name in ("running_mean", "running_var")}
    return {name: value.detach().double().numpy() for name, value in found.items()}


def differences(ranks, whole) -> dict[str, float]:
    """The largest distance of each tensor from the reference, whose values are of order 1."""
    found = {}
    for name, value in whole.items():
        parts = [torch.from_numpy(rank[name]) for rank in ranks]
        if name in ("y", "x"):
            parts = [torch.cat(parts)]
        elif name in ("weight", "bias"):
            parts = [torch.stack(parts).sum(0)]  # local shares, which DDP adds up
        found[name] = max((part - value).abs().max().item() for part in parts)
    return found


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("sizes", [(7,), (3, 0, 4), (0, 0, 1), (1, 2, 2)])
def test_any_split_over_ranks_is_the_formula_over_all_images(sizes, channels_last):
    ranks = run_ranks(len(sizes), with_group, rank_of_split, sizes, torch.float64, channels_last)
    found = differences(ranks, reference(sum(sizes)))
    assert max(found.values()) < 1e-12, found


def test_in_float32_three_ranks_are_the_formula_to_its_digits():
    """Seen: outputs off by 6e-7, and by 2e-6 gradients, whose upstream values are up to 10."""
    ranks = run_ranks(3, with_group, rank_of_split, (3, 0, 4), torch.float32, True)
    found = differences(ranks, reference(7))
    assert max(found.values()) < 1e-5, found
    assert found["y"] < 3e-6
    alone = run_ranks(1, with_group, rank_of_split, (7,), torch.float32, True)
    for name in ("running_mean", "running_var"):  # merged in float64, and rounded once
        assert abs(ranks[0][name] - alone[0][name]).max() < 3e-7


def test_groups_of_ranks_normalize_apart():
    ranks = run_ranks(4, with_group, rank_of_split, (3, 1, 0, 2), torch.float64, False, 2)
    layer, x = trained(), images(6)
    for pair, share in ((ranks[:2], x[:4]), (ranks[2:], x[4:])):
        expected = written_out(share, by_place(layer, "weight"), by_place(layer, "bias")).detach()
        y = torch.cat([torch.from_numpy(rank["y"]) for rank in pair])
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


def network(**options) -> nn.Module:
    torch.manual_seed(0)
    return models.build(
        "bn_inception", num_classes=5, norm=SyncBatchNorm, place_norm=PerActivationNorm, width=0.125, stem="small",
        image_size=24, **options,
    )  # fmt: skip


def rank_counting(rank, world, per_activation):
    import torch.distributed as dist

    calls: list[str] = []
    for name in ("isend", "all_gather_into_tensor", "all_reduce", "all_gather", "broadcast"):
        original = getattr(dist, name)
        setattr(dist, name, lambda *a, _o=original, _n=name, **k: (calls.append(_n), _o(*a, **k))[1])
    net = network(per_activation=per_activation)
    loss = net(torch.randn(2, 3, 24, 24)).main_NK.sum()
    forward = len(calls)
    loss.backward()
    return forward, len(calls) - forward


@pytest.mark.parametrize("per_activation", [0, 2])
def test_a_network_makes_33_exchanges_a_direction_with_them_as_without(per_activation):
    assert run_ranks(2, with_group, rank_counting, per_activation) == [(33, 33)] * 2


def rank_of_network(rank, world, sizes):
    net = network(per_activation=2).double()
    first, end = sum(sizes[:rank]), sum(sizes[: rank + 1])
    x = images(sum(sizes), places=(3, 24, 24))[first:end]
    net(x).main_NK.square().sum().backward()
    return [p.grad.numpy() for p in net.parameters()], [b.double().numpy() for b in net.buffers()]


def test_gradients_and_statistics_of_a_network_do_not_depend_on_ranks():
    ((one, statistics),) = run_ranks(1, with_group, rank_of_network, (7,))
    three = run_ranks(3, with_group, rank_of_network, (4, 0, 3))
    for i, gradient in enumerate(one):
        assert abs(sum(rank[0][i] for rank in three) - gradient).max() < 1e-9
    for i, buffer in enumerate(statistics):
        assert all(abs(rank[1][i] - buffer).max() < 1e-11 for rank in three)


def test_a_level_holds_both_kinds():
    plain, single = SyncBatchNorm(3).double(), trained()
    x, other = images(5), images(5, seed=2)
    left, right = SyncBatchNorm.forward_level([plain, single], [x, other])
    torch.testing.assert_close(left, SyncBatchNorm(3).double()(x), rtol=0, atol=0)
    torch.testing.assert_close(right, trained()(other), rtol=0, atol=0)
    level = SyncBatchNorm.begin_level([single], [x], activation="relu")
    assert level.room(9) is None  # its outputs are copied into a concatenation
    torch.testing.assert_close(level.finish()[0], trained()(x).relu(), rtol=0, atol=0)


def test_taking_channels_last_as_features_copies_nothing():
    x = images(5).contiguous(memory_format=torch.channels_last)
    layer = trained()
    assert layer.flat(x).data_ptr() == x.data_ptr()
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert fused.rows_of(layer.flat(x)) == (5, 24)  # and they lie as the kernels take them


def test_evaluation_uses_the_statistics_of_each_place():
    layer = trained()
    for seed in range(3):
        layer(images(6, seed))
    x = images(2, seed=9)
    mean, variance, weight, bias = (by_place(layer, n) for n in ("running_mean", "running_var", "weight", "bias"))
    expected = weight * (x - mean) / (variance + EPS).sqrt() + bias
    torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fold(nn.Sequential(layer))(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(trained(activation="relu").eval()(x) >= 0, torch.ones_like(x, dtype=torch.bool))


def test_a_folded_network_has_one_product_and_one_sum_in_their_place():
    net = network(per_activation=2).double()
    for _ in range(2):
        net(images(6, places=(3, 24, 24)))
    x = images(3, seed=4, places=(3, 24, 24))
    folded = fold(net)
    torch.testing.assert_close(folded(x).main_NK, net.eval()(x).main_NK, rtol=1e-10, atol=1e-10)
    assert not any(isinstance(m, SyncBatchNorm) for m in folded.modules())
    assert sum(type(m).__name__ == "Elementwise" for m in folded.modules()) == 14
    torch.testing.assert_close(fold(revert(copy.deepcopy(net)))(x).main_NK, folded(x).main_NK, rtol=1e-10, atol=1e-10)


def test_revert_is_torchs_layer_of_flattened_activations_and_convert_undoes_it():
    layer = trained(momentum=0.3)
    layer(images(4))
    state = copy.deepcopy(layer.state_dict())
    model = nn.Sequential(layer, nn.ReLU())
    plain = revert(copy.deepcopy(model))
    assert isinstance(plain[0], nn.BatchNorm1d)
    assert list(plain[0].state_dict()) == list(state) == list(nn.BatchNorm2d(3).state_dict())
    torch.testing.assert_close(plain(images(5)), model(images(5)), rtol=1e-11, atol=1e-12)
    back = convert(plain, group_size=1)
    assert (type(back[0]), back[0].places, back[0].momentum) == (PerActivationNorm, PLACES, 0.3)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(back[0].state_dict()[name], value, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="has activation = 'relu'"):
        revert(nn.Sequential(trained(activation="relu")))


@pytest.mark.parametrize("form", ["batches", "aggregate"])
@pytest.mark.parametrize("plain", [False, True])
def test_population_statistics_are_those_of_each_activation(form, plain):
    model = nn.Sequential(trained())
    model = revert(model) if plain else model
    batches = [images(5, seed) * (seed + 1) for seed in range(3)]
    estimate(model, batches, form=form)
    values = torch.cat(batches)
    torch.testing.assert_close(by_place(model[0], "running_mean"), values.mean(0), rtol=1e-12, atol=1e-12)
    of_batches = torch.stack([batch.var(0, correction=1) for batch in batches]).mean(0)
    expected = of_batches if form == "batches" else values.var(0, correction=0)
    torch.testing.assert_close(by_place(model[0], "running_var"), expected, rtol=1e-12, atol=1e-12)


def test_their_health_and_their_inputs_are_seen():
    layer = trained()
    with torch.no_grad():
        layer.weight[:6] = 0
    model = nn.Sequential(layer)
    seen = Watch(model, ["0"])
    with watch(model) as watching:
        y = model(images(7))
    assert watching.read()["0"].dead == 6 / 24
    (found,) = seen.read().values()
    assert found.unit == 12
    ordered = y.detach().permute(0, 2, 3, 1).flatten(1)[:, 12]
    assert found.of_unit[1] == pytest.approx(ordered.median().item())
    wide = PerActivationNorm((64, 16, 16))
    seen = Watch(nn.Sequential(wide), ["0"])
    y = wide(torch.randn(32, 64, 16, 16))
    (sample,) = seen._samples.values()
    assert sample.shape[0] == 32  # all images, of some activations
    assert VALUES / 2 < sample.numel() <= VALUES
    (found,) = seen.read().values()
    flat = y.detach().permute(0, 2, 3, 1).flatten(1)
    assert found.of_unit[1] == pytest.approx(flat[:, found.unit].quantile(0.5).item(), abs=1e-5)
    assert found.of_all[0] == pytest.approx(flat.flatten()[::7].quantile(0.15).item(), abs=0.02)


def test_an_image_of_another_size_is_refused():
    message = r"input of shape \(2, 3, 4, 4\) does not fit a norm of each activation of \(3, 2, 4\), whose statistics"
    for layer in (trained(), revert(trained()), trained().eval()):
        with pytest.raises(ValueError, match=message):
            layer(torch.zeros(2, 3, 4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="give images of the size that the network was built for"):
        network(per_activation=1)(torch.zeros(2, 3, 32, 32))


def test_last_modules_have_them_and_no_others():
    for count, modules in ((1, {"5b"}), (2, {"5a", "5b"}), (3, {"4e", "5a", "5b"})):
        net = network(per_activation=count, auxiliary_head=True)
        found = {n: m for n, m in net.named_modules() if isinstance(m, PerActivationNorm)}
        assert {name.split(".")[1] for name in found} == modules
        assert len(found) == sum(isinstance(m, Unit) for name in modules for m in net.body[name].modules())
    sides = {name.split(".")[2]: m.places.height for name, m in found.items() if ".4e." in name}
    assert sides == {"reduce3": 6, "reduce33": 6, "conv33a": 6, "conv3": 3, "conv33b": 3}
    full = models.build("bn_inception", num_classes=9, norm=SyncBatchNorm, place_norm=PerActivationNorm,
                        per_activation=1, image_size=224)  # fmt: skip
    found = [m for m in full.modules() if isinstance(m, PerActivationNorm)]
    assert {m.places[1:] for m in found} == {(7, 7)}
    assert sum(m.num_features for m in found) == 1632 * 49


@pytest.mark.parametrize("stem", ["separable", "dense", "small"])
@pytest.mark.parametrize("size", [17, 24, 45, 224])
def test_the_grid_is_that_of_the_images(stem, size):
    if stem == "small" and size == 224:
        size = 32
    net = models.build("bn_inception", num_classes=3, norm=SyncBatchNorm, place_norm=PerActivationNorm, width=0.125,
                       per_activation=10, image_size=size, stem=stem)  # fmt: skip
    assert net(torch.randn(2, 3, size, size)).main_NK.shape == (2, 3)


def test_networks_that_cannot_have_them_say_so():
    build = partial(models.build, num_classes=3, norm=SyncBatchNorm, place_norm=PerActivationNorm)
    with pytest.raises(ValueError, match=r"model\.per_activation = 11 is no number of last modules; give 0 \(none\)"):
        build("bn_inception", per_activation=11, image_size=24)
    with pytest.raises(ValueError, match=r"model\.per_activation = 1 binds the network to images of one size"):
        build("bn_inception", per_activation=1)
    with pytest.raises(ValueError, match=r"asks for norms, and this network is built without; choose bn_inception"):
        build("inception", per_activation=1, image_size=24)
    with pytest.raises(ValueError, match=r"\['per_activation'\] do not exist for torchvision's resnet18"):
        models.build("resnet18", num_classes=3, per_activation=1)


def rank_of_traced(rank, world, sizes):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    results = []
    for compiled in (False, True):
        layer = trained(activation="relu")
        model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False).double(), layer)
        nn.init.ones_(model[0].weight)
        backend = aot_autograd(fw_compiler=lambda g, _: make_boxed_func(g.forward))
        forward = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
        x = images(sum(sizes))[sum(sizes[:rank]) : sum(sizes[: rank + 1])]
        for _ in range(2):
            forward(x).square().sum().backward()
        results.append([t.detach().numpy() for t in (*(p.grad for p in model.parameters()), *layer.buffers())])
    return results


def test_a_traced_step_is_the_step():
    for plain, traced in run_ranks(2, with_group, rank_of_traced, (3, 4)):
        for expected, value in zip(plain, traced, strict=True):
            assert expected.tobytes() == value.tobytes()
