import torch

from pipeline.norm.moments import Moments, batch_moments, merge, merge_packets, pack, packet_of, sums_of


def images(*shape: int, offset: float = 0.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) + offset).to(dtype)


def assert_same(left: Moments, right: Moments, rtol: float) -> None:
    for name in ("count", "mean_C", "m2_C"):
        torch.testing.assert_close(getattr(left, name), getattr(right, name), rtol=rtol, atol=0)


def test_moments_of_two_shards_equal_moments_of_the_whole():
    x_NCHW = images(7, 4, 5, 5, offset=1e3)
    left, right = batch_moments(x_NCHW[:2]), batch_moments(x_NCHW[2:])  # unequal shards
    assert_same(merge(left, right), batch_moments(x_NCHW), rtol=1e-12)


def test_merge_does_not_change_with_an_empty_set():
    x_NCHW = images(3, 4, 2, 2)
    empty = batch_moments(x_NCHW[:0])
    assert empty.count == 0
    assert_same(merge(empty, batch_moments(x_NCHW), empty), batch_moments(x_NCHW), rtol=1e-15)


def test_moments_of_nothing_at_all_are_zero_and_finite():
    nothing = merge(Moments.empty(3, torch.device("cpu")), Moments.empty(3, torch.device("cpu")))
    assert torch.isfinite(nothing.variance_C()).all()
    assert torch.isfinite(nothing.unbiased_variance_C()).all()


def test_float32_moments_are_accurate_at_any_offset():
    for offset in (0.0, 1e3, -1e5):
        x_NCHW = images(16, 3, 8, 8, offset=offset, dtype=torch.float32)
        exact = x_NCHW.double()
        moments = batch_moments(x_NCHW)
        torch.testing.assert_close(moments.mean_C, exact.mean((0, 2, 3)), rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(moments.variance_C(), exact.var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


def test_the_difference_form_that_we_avoid_is_off_by_ten_percent_at_mean_1e3():
    x_NCHW = images(16, 3, 8, 8, offset=1e3, dtype=torch.float32)
    exact_C = x_NCHW.double().var((0, 2, 3), correction=0)
    difference_C = x_NCHW.square().mean((0, 2, 3)) - x_NCHW.mean((0, 2, 3)).square()
    assert ((difference_C - exact_C) / exact_C).abs().max() > 0.01


def test_sums_of_packets_give_the_moments_of_the_union():
    x_NCHW = images(7, 4, 3, 3, offset=10.0)
    parts = [batch_moments(x_NCHW[:2]), batch_moments(x_NCHW[2:2]), batch_moments(x_NCHW[2:])]
    summed = packet_of(torch.stack([sums_of(pack(part)) for part in parts]).sum(0))
    assert_same(merge_packets(summed[None]), batch_moments(x_NCHW), rtol=1e-11)
    assert_same(merge_packets(torch.stack([pack(part) for part in parts])), batch_moments(x_NCHW), rtol=1e-12)


def test_half_precision_input_is_summed_in_float32():
    x_NCHW = images(64, 2, 16, 16, offset=3.0, dtype=torch.bfloat16)
    moments = batch_moments(x_NCHW)
    torch.testing.assert_close(moments.mean_C, x_NCHW.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
