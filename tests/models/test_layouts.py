"""The layout of Cadene's and yjxiong's BN-Inception, against a network written here from its public description."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from pipeline import models
from pipeline.models.layouts import EPS, MEAN_BGR, OPTIONS, LayoutError, from_cadene, is_cadene, mean_of, to_cadene
from pipeline.norm import SyncBatchNorm

# name: 1x1, 3x3 reduce, 3x3, double 3x3 reduce, double 3x3, pooling, projection
TABLE = {
    "3a": (64, 64, 64, 64, 96, "avg", 32), "3b": (64, 64, 96, 64, 96, "avg", 64),
    "3c": (0, 128, 160, 64, 96, "down", 0),
    "4a": (224, 64, 96, 96, 128, "avg", 128), "4b": (192, 96, 128, 96, 128, "avg", 128),
    "4c": (160, 128, 160, 128, 160, "avg", 128), "4d": (96, 128, 192, 160, 192, "avg", 128),
    "4e": (0, 128, 192, 192, 256, "down", 0),
    "5a": (352, 192, 320, 160, 224, "avg", 128), "5b": (352, 192, 320, 192, 224, "max", 128),
}  # fmt: skip


class Theirs(nn.Module):
    """As published: a bias in every convolution, torch's batch norms, ceil mode, padding counted in average pools."""

    def __init__(self, classes: int):
        super().__init__()
        self.unit("conv1_7x7_s2", 3, 64, 7, 2)
        self.unit("conv2_3x3_reduce", 64, 64, 1)
        self.unit("conv2_3x3", 64, 192, 3)
        channels = 192
        for name, (one, reduce, three, reduce2, double, pool, projection) in TABLE.items():
            at, stride = f"inception_{name}_", 2 if pool == "down" else 1
            if one:
                self.unit(at + "1x1", channels, one, 1)
            self.unit(at + "3x3_reduce", channels, reduce, 1)
            self.unit(at + "3x3", reduce, three, 3, stride)
            self.unit(at + "double_3x3_reduce", channels, reduce2, 1)
            self.unit(at + "double_3x3_1", reduce2, double, 3)
            self.unit(at + "double_3x3_2", double, double, 3, stride)
            if projection:
                self.unit(at + "pool_proj", channels, projection, 1)
            channels = one + three + double + (projection or channels)
        self.last_linear = nn.Linear(channels, classes)

    def unit(self, name: str, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        self.add_module(name, nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2))
        self.add_module(name + "_bn", nn.BatchNorm2d(outputs))

    def run(self, name: str, x: Tensor) -> Tensor:
        return torch.relu(getattr(self, name + "_bn")(getattr(self, name)(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.run("conv1_7x7_s2", x), 3, 2, ceil_mode=True)
        x = self.run("conv2_3x3", self.run("conv2_3x3_reduce", x))
        x = nn.functional.max_pool2d(x, 3, 2, ceil_mode=True)
        for name, (one, _, _, _, _, pool, projection) in TABLE.items():
            at = f"inception_{name}_"
            parts = [self.run(at + "1x1", x)] if one else []
            parts.append(self.run(at + "3x3", self.run(at + "3x3_reduce", x)))
            double = self.run(at + "double_3x3_1", self.run(at + "double_3x3_reduce", x))
            parts.append(self.run(at + "double_3x3_2", double))
            if pool == "avg":
                pooled = nn.functional.avg_pool2d(x, 3, 1, 1, ceil_mode=True, count_include_pad=True)
            elif pool == "max":
                pooled = nn.functional.max_pool2d(x, 3, 1, 1, ceil_mode=True)
            else:
                pooled = nn.functional.max_pool2d(x, 3, 2, ceil_mode=True)
            x = torch.cat([*parts, self.run(at + "pool_proj", pooled) if projection else pooled], 1)
        return self.last_linear(x.mean((2, 3)))


def varied(network: nn.Module) -> nn.Module:
    """With norms and biases that are not as they were born."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2, generator=generator)
            elif name.endswith("running_mean"):
                tensor.uniform_(-0.2, 0.2, generator=generator)
            elif tensor.dim() == 1:
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return network.eval()


def theirs(classes: int = 7) -> nn.Module:
    torch.manual_seed(0)
    return varied(Theirs(classes))


def ours(eps: float = EPS, classes: int = 7) -> nn.Module:
    torch.manual_seed(1)
    norm = partial(SyncBatchNorm, eps=eps)
    return models.build("bn_inception", num_classes=classes, norm=norm, **OPTIONS).eval()


def pixels(side: int = 64) -> Tensor:
    """RGB, 0..255."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (2, 3, side, side), generator=generator).double()


def their_logits(network: nn.Module, pixel_NCHW: Tensor, mean_bgr=MEAN_BGR) -> Tensor:
    with torch.no_grad():
        return network.double()(pixel_NCHW.flip(1) - torch.tensor(mean_bgr).double().view(3, 1, 1))


def our_logits(network: nn.Module, pixel_NCHW: Tensor, mean, std) -> Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
    with torch.no_grad():
        return network.double()((pixel_NCHW / 255 - mean) / std).main_NK


def agree(left: Tensor, right: Tensor) -> None:
    """Weights are kept in float32, so each was rounded once: 1e-5 of the spread of the logits."""
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5 * float(right.std()))


@pytest.mark.parametrize("std", [[1 / 255] * 3, [0.229, 0.224, 0.225]])
@pytest.mark.parametrize("side", [64, 224])
def test_weights_in_their_layout_give_their_logits_in_our_network(std, side):
    source, network = theirs(), ours()
    tensors, rows = from_cadene(source.state_dict(), std)
    network.load_state_dict(tensors)  # strict: every tensor has its place
    agree(our_logits(network, pixels(side), mean_of(), std), their_logits(source, pixels(side)))
    assert len(rows) == 70  # 69 units and the last layer
    assert rows[0] == ("conv1_7x7_s2, conv1_7x7_s2_bn", "stem.0", (64, 3, 7, 7),
                       "BGR to RGB, 0..255 to our scale, bias taken off the running mean")  # fmt: skip


@pytest.mark.parametrize("eps", [EPS, 1e-3])
def test_our_weights_in_their_layout_give_our_logits_in_their_network(eps):
    network, target, mean, std = varied(ours(eps)), Theirs(7).eval(), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    tensors, rows = to_cadene(network.state_dict(), std, eps)
    target.load_state_dict(tensors)
    expected = our_logits(network, pixels(), mean, std)
    agree(their_logits(target, pixels(), [255 * value for value in reversed(mean)]), expected)
    assert len(rows) == 70


def test_there_and_back_every_tensor_is_as_it_was():
    network, std = varied(ours()), [0.25, 0.5, 0.125]
    back, _ = from_cadene(to_cadene(network.state_dict(), std, EPS)[0], std)
    assert back.keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(back[name], tensor, rtol=1e-6, atol=0, msg=name)


def test_older_files_with_fc_and_norms_of_two_dimensions_are_read_too():
    source = theirs().state_dict()
    old = {name.replace("last_linear", "fc"): tensor for name, tensor in source.items() if "tracked" not in name}
    old = {name: t[None] if "_bn." in name else t for name, t in old.items()}
    assert is_cadene(old)
    left, right = from_cadene(old, [1 / 255] * 3)[0], from_cadene(source, [1 / 255] * 3)[0]
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_what_is_missing_or_left_over_is_listed():
    source = theirs().state_dict()
    del source["inception_4e_3x3_bn.running_var"]
    source["inception_6a_1x1.weight"] = torch.zeros(1)
    with pytest.raises(LayoutError, match=r"1 missing \(inception_4e_3x3_bn.running_var\), 1 left over \(inception_6a"):
        from_cadene(source, [1 / 255] * 3)
    for options in ({"stem": "separable"}, {"response_norm": True}):
        other = models.build("bn_inception", num_classes=7, norm=SyncBatchNorm, **{**OPTIONS, **options})
        with pytest.raises(LayoutError, match=r"the network is not of Cadene's layout .* model.stem=dense"):
            to_cadene(other.state_dict(), [1 / 255] * 3, 1e-3)


def test_padding_is_counted_in_average_pools_where_asked_and_nowhere_else():
    x = torch.ones(1, 3, 64, 64)
    for counted in (False, True):
        options = {**OPTIONS, "count_padding": counted}
        network = models.build("bn_inception", num_classes=2, norm=None, **options)
        pools = [m for m in network.modules() if isinstance(m, nn.AvgPool2d)]
        assert len(pools) == 7
        corner = pools[0](x)[0, 0, 0, 0]
        assert corner == pytest.approx(4 / 9 if counted else 1.0)
