import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline import models
from pipeline.models.blocks import SampleDropout, Unit, set_sample_keys
from pipeline.norm import SyncBatchNorm


def build(name: str = "bn_inception", **options: object) -> nn.Module:
    return models.build(name, num_classes=1000, norm=SyncBatchNorm, **options)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Every row: reference of the facts is the arithmetic of the paper's figure 5.
@pytest.mark.parametrize(
    ("count", "name", "options"),
    [
        (11_188_288, "bn_inception", {}),
        (11_194_984, "bn_inception", {"stem": "dense"}),
        (11_285_224, "bn_inception", {"stem": "dense", "literal_fig5": True}),
        (11_278_528, "bn_inception", {"literal_fig5": True}),
        (11_185_032, "inception", {"stem": "dense"}),
        (11_178_336, "inception", {}),
        (11_275_208, "inception", {"stem": "dense", "literal_fig5": True}),
        (13_601_520, "inception", {"stem": "dense", "auxiliary_head": True}),
        (13_594_824, "inception", {"auxiliary_head": True}),
        (13_611_600, "bn_inception", {"stem": "dense", "auxiliary_head": True}),
        (13_604_904, "bn_inception", {"auxiliary_head": True}),
        (13_695_792, "inception", {"stem": "dense", "literal_fig5": True, "auxiliary_head": True}),
        (13_705_936, "bn_inception", {"stem": "dense", "literal_fig5": True, "auxiliary_head": True}),
    ],
)
def test_parameters_are_those_of_the_paper(count, name, options):
    assert parameters(build(name, **options)) == count


def test_parameters_split_into_convolutions_norms_and_classifier():
    model = build()
    convolutions = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    norms = sum(parameters(m) for m in model.modules() if isinstance(m, SyncBatchNorm))
    assert (convolutions, norms, parameters(model.classifier)) == (10_143_384, 19_904, 1_025_000)


@pytest.mark.parametrize(
    ("billions", "options"),
    [
        (2.0189, {"stem": "dense"}),
        (1.9349, {}),
        (2.0326, {"stem": "dense", "literal_fig5": True}),
        (1.9486, {"literal_fig5": True}),
    ],
)
def test_multiply_adds_are_those_of_the_paper(billions, options):
    model = build(**options).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    assert round(counter.get_total_flops() / 2e9, 4) == billions


def shapes(model: nn.Module, size: int) -> dict[str, tuple[int, ...]]:
    seen: dict[str, tuple[int, ...]] = {}
    parts = {**{f"stem{i}": m for i, m in enumerate(model.stem)}, **dict(model.body.items())}
    for name, part in parts.items():
        told = part.norm if isinstance(part, Unit) else part  # a unit of the stem is a level of its own
        told.register_forward_hook(
            lambda m, i, o, name=name: seen.update({name: tuple((o[0] if isinstance(o, tuple) else o).shape[1:])})
        )
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    return seen


def test_shapes_of_every_stage_are_those_of_figure_5():
    assert shapes(build(), 224) == {
        "stem0": (64, 112, 112), "stem1": (64, 56, 56), "stem2": (64, 56, 56), "stem3": (192, 56, 56),
        "stem4": (192, 28, 28), "3a": (256, 28, 28), "3b": (320, 28, 28), "3c": (576, 14, 14), "4a": (576, 14, 14),
        "4b": (576, 14, 14), "4c": (576, 14, 14), "4d": (576, 14, 14), "4e": (1024, 7, 7), "5a": (1024, 7, 7),
        "5b": (1024, 7, 7),
    }  # fmt: skip
    literal = shapes(build(literal_fig5=True), 224)
    assert (literal["4c"], literal["4d"], literal["4e"]) == ((608, 14, 14), (608, 14, 14), (1056, 7, 7))
    assert shapes(build(stem="small", width=0.25), 32)["3a"][1:] == (16, 16)


@pytest.mark.parametrize("size", [8, 17, 28, 31, 45])
def test_images_of_any_size_fit(size):
    for stem in ("separable", "dense", "small"):
        model = models.build("bn_inception", num_classes=3, norm=SyncBatchNorm, stem=stem, width=0.125)
        assert model(torch.randn(2, 3, size, size + 3)).main_NK.shape == (2, 3)


def test_there_are_69_norms_of_9952_channels_directly_before_the_nonlinearity():
    for stem in ("separable", "dense", "small"):
        model = build(stem=stem)
        norms = [m for m in model.modules() if isinstance(m, SyncBatchNorm)]
        assert (len(norms), sum(n.num_features for n in norms)) == (69, 9952)
        assert sum(isinstance(m, Unit) for m in model.modules()) == 69
    assert sum(n.num_features for n in build(literal_fig5=True).modules() if isinstance(n, SyncBatchNorm)) == 10_016


def test_convolutions_have_a_bias_only_where_no_norm_follows():
    assert all(m.bias is None for m in build().modules() if isinstance(m, nn.Conv2d))
    plain = [m for m in build("inception").modules() if isinstance(m, nn.Conv2d)]
    assert sum(m.bias is None for m in plain) == 1  # the depthwise one


def test_the_network_is_33_levels_whose_exchanges_run_beside_other_branches():
    levels: list[list[int]] = []

    class LevelNorm(SyncBatchNorm):
        @staticmethod
        def begin_level(layers, xs, followers=(), activation=None):
            levels.append([layer.num_features for layer in layers])
            return SyncBatchNorm.begin_level(layers, xs, followers, activation)

    class LonelyNorm(SyncBatchNorm):
        begin_level = None

    outputs = []
    for norm in (LevelNorm, LonelyNorm):
        torch.manual_seed(0)
        model = models.build("bn_inception", num_classes=10, norm=norm, stem="small", width=0.25)
        outputs.append(model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))).main_NK)
    assert torch.equal(*outputs)
    # As many as the longest path has layers: 3 of the stem and 3 of each module.
    assert len(levels) == 33
    assert [len(level) for level in levels[:12]] == [1, 1, 1, 2, 3, 2, 2, 3, 2, 2, 2, 1]
    assert sum(map(len, levels)) == 69


def test_sigmoid_replaces_every_rectifier_and_gain_scales_convolutions():
    assert (build(activation="sigmoid", stem="small", width=0.25).stem(torch.randn(1, 3, 8, 8)) >= 0).all()
    torch.manual_seed(0)
    one = build(width=0.25).body["3a"].conv3.conv.weight
    torch.manual_seed(0)
    two = build(width=0.25, initial_gain=2.0).body["3a"].conv3.conv.weight
    torch.testing.assert_close(two, 2 * one)


def test_auxiliary_head_speaks_in_training_only():
    model = build(auxiliary_head=True, width=0.25)
    assert model(torch.randn(2, 3, 224, 224)).auxiliary_NK.shape == (2, 1000)
    assert model.eval()(torch.randn(2, 3, 224, 224)).auxiliary_NK is None


def test_every_option_takes_an_empty_batch():
    for name, options in (("bn_inception", {}), ("inception", {"response_norm": True, "dropout": 0.4})):
        model = models.build(name, num_classes=5, norm=SyncBatchNorm, stem="small", width=0.25, **options)
        set_sample_keys(model, torch.zeros(0, dtype=torch.int64))
        model(torch.zeros(0, 3, 32, 32)).main_NK.sum().backward()
        assert all((p.grad == 0).all() for p in model.parameters())


def test_response_norm_and_adaptive_pool_are_torchs_arithmetic():
    from pipeline.models.inception import LocalResponseNorm, _adaptive_pool

    x = torch.randn(2, 9, 7, 5, dtype=torch.float64) * 30
    torch.testing.assert_close(LocalResponseNorm()(x), nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)(x))
    torch.testing.assert_close(_adaptive_pool(x, 4), nn.functional.adaptive_avg_pool2d(x, 4))


def test_dropout_masks_depend_on_key_and_layer_alone():
    layer, x = SampleDropout(0.4), torch.ones(6, 500)
    layer.key_N = torch.arange(6) * 7919
    whole = layer(x)
    layer.key_N = layer.key_N[2:]
    assert torch.equal(layer(x[2:]), whole[2:])
    assert abs((whole == 0).float().mean() - 0.4) < 0.03
    assert torch.equal(whole.unique(), torch.tensor([0, 1 / 0.6]))
    assert len({tuple(row.tolist()) for row in whole}) == 6
    other = SampleDropout(0.4, layer=1)
    other.key_N = torch.arange(6) * 7919
    assert not torch.equal(other(x), whole)
    assert torch.equal(layer.eval()(x), x)


def test_dropout_without_keys_is_refused():
    with pytest.raises(RuntimeError, match=r"has keys for 0 of 3 images; call set_sample_keys"):
        SampleDropout(0.5)(torch.ones(3, 2))


def convolution_costs(model: nn.Module) -> dict[str, tuple[int, float]]:
    """Weights and millions of multiply-adds of the convolutions of each part, at 224x224."""
    costs: dict[str, list[float]] = {}

    def count(part: str):
        def hook(module: nn.Conv2d, inputs, output):
            entry = costs.setdefault(part, [0, 0.0])
            entry[0] += module.weight.numel()
            entry[1] += module.weight.numel() * output.shape[2] * output.shape[3] / 1e6

        return hook

    parts = {f"stem{i}": m for i, m in enumerate(model.stem)} | dict(model.body.items())
    for name, part in parts.items():
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count(name))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 224, 224))
    return {name: (int(weights), round(macs, 1)) for name, (weights, macs) in costs.items()}


def test_weights_and_multiply_adds_of_every_stage():
    dense = convolution_costs(build(stem="dense"))
    assert dense == {
        "stem0": (9_408, 118.0), "stem2": (4_096, 12.8), "stem3": (110_592, 346.8), "3a": (218_112, 171.0),
        "3b": (259_072, 203.1), "3c": (384_000, 143.9), "4a": (608_256, 119.2), "4b": (663_552, 130.1),
        "4c": (893_952, 175.2), "4d": (1_105_920, 216.8), "4e": (1_437_696, 162.6), "5a": (2_179_072, 106.8),
        "5b": (2_276_352, 111.5),
    }  # fmt: skip
    assert convolution_costs(build())["stem0"] == (2_712, 34.0)
    literal = convolution_costs(build(stem="dense", literal_fig5=True))
    assert [literal[name] for name in ("4c", "4d", "4e", "5a")] == [
        (912_384, 178.8), (1_140_736, 223.6), (1_447_936, 164.6), (2_205_696, 108.1),
    ]  # fmt: skip


def test_layers_and_values_are_counted_as_in_the_paper():
    for stem, convolutions in (("dense", 69), ("separable", 70)):
        assert sum(isinstance(m, nn.Conv2d) for m in build(stem=stem).modules()) == convolutions
    values = 0
    model = build(stem="dense").eval()

    def add(module, inputs, output):
        nonlocal values
        values += output.numel()

    for module in model.modules():
        if isinstance(module, SyncBatchNorm):
            module.register_forward_hook(add)
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    assert values == 3_724_000


def test_channels_of_every_level_are_those_to_be_exchanged_together():
    forward = {
        name: [sum(u.norm.num_features for u in units if u is not None) for units in (
            (m.conv1, m.reduce3, m.reduce33, m.projection), (m.conv3, m.conv33a), (m.conv33b,))]
        for name, m in build().body.items()
    }  # fmt: skip
    assert forward == {
        "3a": [224, 160, 96], "3b": [256, 192, 96], "3c": [192, 256, 96], "4a": [512, 224, 128], "4b": [512, 256, 128],
        "4c": [512, 320, 160], "4d": [480, 384, 192], "4e": [320, 448, 256], "5a": [832, 544, 224],
        "5b": [864, 544, 224],
    }  # fmt: skip


def test_pools_and_wiring_are_those_of_figure_5():
    body = build().body
    for name, module in body.items():
        halves = name in ("3c", "4e")
        assert (module.conv1 is None, module.projection is None) == (halves, halves)
        assert module.conv3.conv.stride == module.conv33b.conv.stride == ((2, 2) if halves else (1, 1))
        assert module.conv33a.conv.stride == (1, 1)
    average = {name for name, module in body.items() if isinstance(module.pool, nn.AvgPool2d)}
    assert average == {"3a", "3b", "4a", "4b", "4c", "4d", "5a"}
    assert all(not body[name].pool.count_include_pad for name in average)
