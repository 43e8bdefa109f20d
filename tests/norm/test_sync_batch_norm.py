import pytest
import torch
from torch import nn
from torchvision import models as torchvision_models

from pipeline.norm import SyncBatchNorm, SyncBatchNorm2d, convert, revert
from tests.multiprocess.ranks import run_ranks, with_group


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 3


def layer_pair(channels: int = 4) -> tuple[SyncBatchNorm, nn.BatchNorm2d]:
    ours, theirs = SyncBatchNorm(channels, eps=1e-3).double(), nn.BatchNorm2d(channels, eps=1e-3).double()
    with torch.no_grad():
        theirs.weight.copy_(torch.linspace(0.5, 2, channels))
        theirs.bias.copy_(torch.linspace(-1, 1, channels))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def test_without_a_process_group_it_equals_batch_norm():
    ours, theirs = layer_pair()
    x_NCHW, dy = images(5, 4, 3, 3), images(5, 4, 3, 3, seed=1)
    left, right = x_NCHW.clone().requires_grad_(), x_NCHW.clone().requires_grad_()
    torch.testing.assert_close(ours(left), theirs(right), rtol=1e-12, atol=1e-12)
    ours(left).backward(dy)
    theirs(right).backward(dy)
    torch.testing.assert_close(left.grad, right.grad, rtol=1e-11, atol=1e-12)
    for ours_tensor, theirs_tensor in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_tensor.grad, theirs_tensor.grad, rtol=1e-12, atol=1e-12)
    for name, buffer in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], buffer, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.eval()(x_NCHW), theirs.eval()(x_NCHW))


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (3, 4, 2, 3, 2)])
def test_it_takes_any_number_of_trailing_dimensions(shape):
    x = images(*shape).requires_grad_()
    y = SyncBatchNorm(4, eps=0.0).double()(x)
    reduced = [d for d in range(x.dim()) if d != 1]
    torch.testing.assert_close(y.mean(reduced), torch.zeros(4).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(y.square().mean(reduced), torch.ones(4).double(), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(SyncBatchNorm(4).double(), (x,))


def rank_of_split(rank, world, sizes, group_size):
    ours, _ = layer_pair()
    ours.group_size = group_size
    starts = [sum(sizes[:r]) for r in range(world + 1)]
    mine = slice(starts[rank], starts[rank + 1])
    x, dy = images(sum(sizes), 4, 3, 2)[mine].requires_grad_(), images(sum(sizes), 4, 3, 2, seed=1)[mine]
    y = ours(x)
    y.backward(dy)
    return [t.detach().numpy() for t in (y, x.grad, ours.weight.grad, ours.bias.grad)], {
        name: value.numpy() for name, value in ours.state_dict().items()
    }


@pytest.mark.parametrize("sizes", [(4, 5), (7, 2, 0), (0, 0, 1), (3, 0, 2, 1)])
def test_any_split_over_ranks_equals_batch_norm_of_the_whole(sizes):
    _, theirs = layer_pair()
    x, dy = images(sum(sizes), 4, 3, 2).requires_grad_(), images(sum(sizes), 4, 3, 2, seed=1)
    y = theirs(x)
    y.backward(dy)
    results = run_ranks(len(sizes), with_group, rank_of_split, sizes, 0)
    outputs, x_grads, weight_grads, bias_grads = (
        [torch.from_numpy(result[0][i]) for result in results] for i in range(4)
    )
    close = {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(torch.cat(outputs), y.detach(), **close)
    torch.testing.assert_close(torch.cat(x_grads), x.grad, **close)
    torch.testing.assert_close(torch.stack(weight_grads).sum(0), theirs.weight.grad, **close)
    torch.testing.assert_close(torch.stack(bias_grads).sum(0), theirs.bias.grad, **close)
    for _, state in results:
        for name, buffer in theirs.state_dict().items():
            torch.testing.assert_close(torch.from_numpy(state[name]), buffer, **close, msg=name)


def test_groups_of_ranks_normalize_apart():
    sizes = (3, 1, 0, 2)
    results = run_ranks(4, with_group, rank_of_split, sizes, 2)
    outputs = torch.cat([torch.from_numpy(r[0][0]) for r in results])
    x = images(6, 4, 3, 2)
    expected = torch.cat([layer_pair()[1](x[:4]), layer_pair()[1](x[4:])])
    torch.testing.assert_close(outputs, expected.detach(), rtol=1e-11, atol=1e-12)
    assert (results[0][1]["running_mean"] == results[1][1]["running_mean"]).all()
    assert (results[1][1]["running_mean"] != results[2][1]["running_mean"]).all()


def rank_of_large_group(rank, world):
    from pipeline.norm import collectives

    collectives.GATHER_LIMIT = 1
    return rank_of_split(rank, world, (2, 3), 0)


def test_the_summed_exchange_of_large_groups_agrees_with_the_gathered_one():
    gathered = run_ranks(2, with_group, rank_of_split, (2, 3), 0)
    summed = run_ranks(2, with_group, rank_of_large_group)
    for left, right in zip(gathered, summed, strict=True):
        for a, b in zip(left[0], right[0], strict=True):
            torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b), rtol=1e-11, atol=1e-12)


def rank_of_bits(rank, world):
    torch.manual_seed(rank)
    layer = SyncBatchNorm(8)
    x = torch.randn(5, 8, 4, 4, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    return y.detach().numpy().tobytes(), x.grad.numpy().tobytes()


def test_bits_repeat_on_the_same_ranks():
    assert run_ranks(3, with_group, rank_of_bits) == run_ranks(3, with_group, rank_of_bits)


def rank_counting_collectives(rank, world):
    import torch.distributed as dist

    calls: list[str] = []
    for name in ("isend", "all_gather_into_tensor", "all_reduce", "all_gather", "broadcast"):
        original = getattr(dist, name)
        setattr(dist, name, lambda *a, _o=original, _n=name, **k: (calls.append(_n), _o(*a, **k))[1])
    layer = SyncBatchNorm(3)
    x = torch.randn(2, 3, 4, requires_grad=True)
    y = layer(x)
    forward = len(calls)
    y.sum().backward()
    backward = len(calls) - forward
    layer.eval()(x)
    return forward, backward, len(calls) - forward - backward


def test_one_exchange_forward_one_backward_none_in_evaluation():
    assert run_ranks(2, with_group, rank_counting_collectives) == [(1, 1, 0)] * 2


def rank_of_wrong_group(rank, world):
    try:
        SyncBatchNorm(3, group_size=2)(torch.randn(2, 3, 4))
    except ValueError as error:
        return str(error)
    return None


def test_a_group_size_that_does_not_divide_is_refused_on_every_rank():
    messages = run_ranks(3, with_group, rank_of_wrong_group)
    assert len(set(messages)) == 1
    assert "norm.group_size = 2 does not divide the world of 3 ranks; choose one of [1, 3]" in messages[0]


def test_output_does_not_change_with_the_scale_of_its_input():
    x = images(6, 4, 3, 3)
    layer = SyncBatchNorm(4, eps=0.0).double()
    torch.testing.assert_close(layer(17.0 * x), layer(x), rtol=1e-12, atol=1e-12)


def test_gradient_is_orthogonal_to_the_weights_and_scales_inversely_with_them():
    u, dy = images(8, 3, 5, 5), images(8, 4, 3, 3, seed=1)
    weight = images(4, 3, 3, 3, seed=2)

    def gradients(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        w, x = (scale * weight).requires_grad_(), u.clone().requires_grad_()
        SyncBatchNorm(4, eps=0.0).double()(nn.functional.conv2d(x, w)).backward(dy)
        return w.grad, x.grad

    (dw, dx), (dw_scaled, dx_scaled) = gradients(1.0), gradients(5.0)
    torch.testing.assert_close(dx_scaled, dx, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dw_scaled, dw / 5, rtol=1e-10, atol=1e-12)
    assert (dw * weight).sum().abs() < 1e-10 * dw.norm() * weight.norm()


def test_input_gradient_sums_to_zero_and_obeys_the_norm_identity():
    x, dy = images(6, 3, 4, 4).requires_grad_(), images(6, 3, 4, 4, seed=1)
    layer = SyncBatchNorm(3, eps=0.0).double()
    y = layer(x)
    y.backward(dy)
    reduced, m = (0, 2, 3), 6 * 16
    torch.testing.assert_close(x.grad.sum(reduced), torch.zeros(3).double(), rtol=0, atol=1e-12)
    s2 = x.detach().var(reduced, correction=0)
    right = dy.square().sum(reduced) - dy.sum(reduced) ** 2 / m - (dy * y.detach()).sum(reduced) ** 2 / m
    torch.testing.assert_close(x.grad.square().sum(reduced), right / s2, rtol=1e-11, atol=0)


def test_half_precision_keeps_its_type_and_float32_statistics():
    for dtype in (torch.bfloat16, torch.float16):
        x = (torch.randn(8, 4, 6, 6) * 3 + 20).to(dtype).requires_grad_()
        layer = SyncBatchNorm(4)
        y = layer(x)
        y.float().square().sum().backward()
        assert y.dtype == x.grad.dtype == dtype
        assert layer.running_mean.dtype == layer.weight.grad.dtype == torch.float32
        torch.testing.assert_close(layer.running_mean, 0.1 * x.detach().float().mean((0, 2, 3)), rtol=1e-5, atol=0)


def test_momentum_none_averages_all_batches_alike():
    layer = SyncBatchNorm(2, momentum=None).double()
    batches = [images(4, 2, 3, seed=s) for s in range(3)]
    for batch in batches:
        layer(batch)
    means = torch.stack([b.mean((0, 2)) for b in batches])
    variances = torch.stack([b.var((0, 2), correction=1) for b in batches])
    torch.testing.assert_close(layer.running_mean, means.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(layer.running_var, variances.mean(0), rtol=1e-12, atol=0)


def test_a_batch_without_any_image_is_no_batch():
    layer = SyncBatchNorm(2, momentum=None).double()
    layer(torch.zeros(0, 2, 3).double())
    layer(torch.full((4, 2, 3), 8.0).double())
    assert layer.num_batches_tracked == 1
    assert (layer.running_mean == 8).all()


def test_fused_activation_equals_a_separate_one():
    x = images(4, 3, 2, 2)
    assert torch.equal(SyncBatchNorm(3, activation="relu").double()(x), SyncBatchNorm(3).double()(x).relu())
    with pytest.raises(ValueError, match="activation = 'gelu' is not offered; choose None or \"relu\""):
        SyncBatchNorm(3, activation="gelu")


def test_an_input_of_other_channels_is_refused():
    with pytest.raises(
        ValueError, match=r"input of shape \(2, 3\) does not fit num_features = 4; it must be \(N, 4, \*\)"
    ):
        SyncBatchNorm(4)(torch.zeros(2, 3))


def test_convert_and_revert_are_exact_inverses():
    model = torchvision_models.resnet18(num_classes=10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = {name: (type(m), repr(m)) for name, m in model.named_modules()}
    parameters = dict(model.named_parameters())
    converted = convert(model, group_size=1)
    assert sum(isinstance(m, SyncBatchNorm) for m in converted.modules()) == 20
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in converted.modules())
    assert list(converted.state_dict()) == list(before)
    reverted = revert(converted)
    assert {name: (type(m), repr(m)) for name, m in reverted.named_modules()} == kinds
    for name, value in reverted.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter is parameters[name] for name, parameter in reverted.named_parameters())


def test_convert_keeps_every_kind_flag_and_shared_layer():
    shared = nn.BatchNorm1d(3, affine=False).eval()
    model = nn.ModuleList([shared, shared, nn.BatchNorm3d(2, track_running_stats=False, momentum=None)])
    converted = convert(model)
    assert converted[0] is converted[1]
    assert not converted[0].training
    back = revert(converted)
    assert [type(m) for m in back] == [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm3d]
    assert back[2].momentum is None
    assert isinstance(convert(nn.BatchNorm2d(3)), SyncBatchNorm2d)


def test_revert_refuses_a_fused_activation():
    with pytest.raises(ValueError, match=r"which nn\.BatchNorm2d lacks"):
        revert(nn.Sequential(SyncBatchNorm(3, activation="relu")))


def test_state_dict_is_interchangeable_with_torch():
    ours, theirs = SyncBatchNorm(5), nn.BatchNorm2d(5)
    theirs(torch.randn(3, 5, 2, 2))
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_normalized_values_have_mean_0_and_the_variance_that_eps_leaves():
    x, eps = images(5, 3, 4, 4), 0.1
    y = SyncBatchNorm(3, eps=eps).double()(x)
    s2 = x.var((0, 2, 3), correction=0)
    torch.testing.assert_close(y.sum((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-11)
    torch.testing.assert_close(y.square().mean((0, 2, 3)), s2 / (s2 + eps), rtol=1e-12, atol=0)


def test_gamma_and_beta_can_give_the_input_back():
    x = images(5, 3, 4, 4)
    layer = SyncBatchNorm(3, eps=1e-3).double()
    with torch.no_grad():
        layer.weight.copy_((x.var((0, 2, 3), correction=0) + 1e-3).sqrt())
        layer.bias.copy_(x.mean((0, 2, 3)))
    torch.testing.assert_close(layer(x), x, rtol=1e-12, atol=1e-12)


def test_the_papers_chain_of_derivatives_agrees_with_ours():
    x, dy, eps = images(7, 1).requires_grad_(), images(7, 1, seed=1), 0.01
    layer = SyncBatchNorm(1, eps=eps).double()
    with torch.no_grad():
        layer.weight.fill_(1.7)
    layer(x).backward(dy)
    v, m, gamma = x.detach(), 7, 1.7
    mu, s2 = v.mean(), v.var(correction=0)
    dxhat = dy * gamma
    ds2 = (dxhat * (v - mu)).sum() * -0.5 * (s2 + eps) ** -1.5
    dmu = -dxhat.sum() / (s2 + eps).sqrt() + ds2 * (-2 * (v - mu)).sum() / m
    dx = dxhat / (s2 + eps).sqrt() + ds2 * 2 * (v - mu) / m + dmu / m
    torch.testing.assert_close(x.grad, dx, rtol=1e-12, atol=1e-13)
    xhat = (v - mu) / (s2 + eps).sqrt()
    torch.testing.assert_close(
        (x.grad * xhat).sum(),
        gamma / (s2 + eps).sqrt() * m * (dy * xhat).mean() * eps / (s2 + eps),
        rtol=1e-9,
        atol=1e-12,
    )


def test_scaled_weights_with_eps_scaled_by_their_square_give_the_same_output():
    x = images(6, 4, 3, 3)
    one, scaled = SyncBatchNorm(4, eps=0.01).double(), SyncBatchNorm(4, eps=0.01 * 9).double()
    torch.testing.assert_close(scaled(3 * x), one(x), rtol=1e-12, atol=1e-12)
