"""The fused kernels against plain operations, by Triton's interpreter where there is no GPU; and their machine code."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.models.blocks import Inception, Style, Widths
from pipeline.norm import PerActivationNorm, SyncBatchNorm, convert, fused, normalization
from pipeline.norm.moments import Moments, batch_moments, pack
from pipeline.norm.normalization import Running, Statistics
from tests.multiprocess.ranks import run_ranks, with_group

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this torch comes without Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What a type's digits leave of values of a few units, for what is stored in it.
CLOSE = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1.6e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
}


class Case(NamedTuple):
    """One layer's tensors, of which the whole is a function."""

    shape: tuple[int, ...]
    layout: str  # rows, or slice: of the channels of something wider
    dtype: torch.dtype
    affine: bool
    activation: str | None
    seed: int

    def tensor(self, number: int, offset: float = 0.0, layout: str | None = None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 8 + number)
        n, c, *pixels = self.shape
        values = torch.randn(n, *pixels, c, generator=generator) * 2 + offset
        if (layout or self.layout) == "slice":
            values = torch.cat([values, values * 0 + 7, values * 0 - 7], -1)[..., :c]
        return values.to(DEVICE, self.dtype).movedim(-1, 1)

    def channel(self, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 8 + number)
        return torch.randn(self.shape[1], generator=generator).to(DEVICE)


shapes = st.one_of(
    st.tuples(st.integers(1, 70), st.integers(1, 20)),
    st.tuples(st.integers(1, 4), st.integers(1, 140), st.integers(1, 5)),
    st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
)
cases = st.builds(
    Case, shapes, st.sampled_from(["rows", "slice"]), st.sampled_from(list(CLOSE)), st.booleans(),
    st.sampled_from([None, "relu"]), st.integers(0, 99),
)  # fmt: skip


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(case=cases, other_layout=st.sampled_from(["rows", "slice"]), ranks=st.integers(1, 3), cumulative=st.booleans())
def test_kernels_agree_with_plain_operations(case, other_layout, ranks, cumulative):
    x, dy = case.tensor(0, offset=3.0), case.tensor(1, layout=other_layout)
    channels = x.shape[1]
    weight, bias = (case.channel(2), case.channel(3)) if case.affine else (None, None)

    ours, theirs = fused.packet(x), normalization.packet(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    others = [pack(batch_moments(case.tensor(4 + r).float())) for r in range(ranks - 1)]
    rows_RP = torch.stack([theirs, *others])
    momentum = None if cumulative else 0.3
    found = []
    for arithmetic in (fused, normalization):
        running = Running(case.channel(5), case.channel(6).square(), torch.tensor(3, device=DEVICE), momentum)
        known = arithmetic.statistics(rows_RP, weight, 1e-3, torch.float32, running)
        found.append([*known, *running[:3]])
    for mine, other in zip(*found, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)

    known = Statistics(*found[1][:4])
    y = normalization.normalized(x, known, bias, case.activation)
    torch.testing.assert_close(fused.normalized(x, known, bias, case.activation), y, **CLOSE[case.dtype])
    wide = torch.full((*x.movedim(1, -1).shape[:-1], channels + 5), 9.0, device=DEVICE, dtype=case.dtype).movedim(-1, 1)
    fused.normalized(x, known, bias, case.activation, out=wide[:, 2 : 2 + channels])
    torch.testing.assert_close(wide[:, 2 : 2 + channels], y, **CLOSE[case.dtype])
    assert (wide[:, :2] == 9).all()
    assert (wide[:, 2 + channels :] == 9).all()

    mine = fused.Backward(dy, x, known, bias, case.activation)
    other = normalization.Backward(dy, x, y if case.activation else None, known, weight)
    torch.testing.assert_close(mine.sums_2C, other.sums_2C, rtol=1e-5, atol=1e-4)
    totals_RP = torch.stack([other.sums_2C, *(torch.ones_like(other.sums_2C) for _ in others)])
    torch.testing.assert_close(mine.dx(totals_RP), other.dx(totals_RP), **CLOSE[case.dtype])


@pytest.mark.parametrize("dtype", CLOSE)
def test_the_variance_is_accurate_at_any_offset(dtype):
    offset = {torch.float32: 1e3, torch.bfloat16: 4.0, torch.float16: 30.0}[dtype]
    x = Case((40, 6, 7, 5), "rows", dtype, True, None, 1).tensor(0, offset) / 2
    x[0, 0] = 8 * offset  # the value that the others are taken relative to, far from all of them
    exact = batch_moments(x.double())
    count, mean_C, m2_C = torch.split(fused.packet(x), [1, 6, 6])
    assert count == 40 * 35
    torch.testing.assert_close(mean_C, exact.mean_C, rtol=1e-6, atol=0)
    torch.testing.assert_close(m2_C, exact.m2_C, rtol=1e-5, atol=0)


def test_a_part_of_the_rows_has_the_moments_of_that_part(monkeypatch):
    """Many parts, and a last one that is not full: what large layers have, on a small one."""
    monkeypatch.setattr(fused, "_PARTS", 7)
    monkeypatch.setattr(fused, "_TILE", 64)
    case = Case((9, 3, 5, 5), "rows", torch.float32, True, "relu", 2)
    x, dy = case.tensor(0, 100.0), case.tensor(1)
    assert fused._split(225, 3) == (7, 36, 1, 4, 16)  # the last of 36 rows has 9
    exact = batch_moments(x.double())
    torch.testing.assert_close(fused.packet(x)[1:], torch.cat([exact.mean_C, exact.m2_C]), rtol=1e-6, atol=0)
    known = normalization.statistics(normalization.packet(x)[None], None, 1e-3, torch.float32, None)
    y = normalization.normalized(x, known, None, "relu")
    sums = fused.Backward(dy, x, known, None, "relu").sums_2C
    expected = normalization.Backward(dy, x, y, known, None).sums_2C
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-4)


def test_a_value_that_is_no_number_is_not_hidden_by_a_relu():
    x = Case((4, 3, 2, 2), "rows", torch.float32, True, "relu", 3).tensor(0)
    x[1, 2, 0, 0] = float("nan")
    known = fused.statistics(fused.packet(x)[None], None, 1e-3, torch.float32, None)
    y = fused.normalized(x, known, None, "relu")
    assert y[:, 2].isnan().all()
    assert not y[:, :2].isnan().any()


def test_what_lies_in_rows_is_told_from_what_does_not():
    images = torch.empty(4, 6, 5, 3)
    last = images.contiguous(memory_format=torch.channels_last)
    table = [
        (images, None), (last, (60, 6)), (last[:, 1:4], (60, 6)), (last[1:], (45, 6)), (last[:, :, 1:], None),
        (last[:, :, :, :1], (20, 18)), (last[:1, :, :1, :1], (1, 0)), (torch.empty(7, 5), (7, 5)),
        (torch.empty(7, 9)[:, 2:6], (7, 9)), (torch.empty(7, 9)[:, ::2], None), (torch.empty(9, 7).t(), None),
        (torch.empty(1, 6, 1, 1).expand(3, 6, 2, 2), None), (torch.empty(8, 1, 4), (32, 1)),
        (last.permute(3, 1, 2, 0), None),
    ]  # fmt: skip
    assert [fused.rows_of(x) for x, _ in table] == [rows for _, rows in table]
    assert not fused.serves(last)  # not on a GPU


@pytest.fixture
def forced(monkeypatch):
    """The layer takes the kernels wherever they could serve, were it on a GPU."""
    calls = []

    def serves(x):
        served = x.numel() > 0 and x.dtype != torch.float64 and fused.rows_of(x) is not None
        calls.append(served)
        return served

    monkeypatch.setattr(fused, "serves", serves)
    return calls


def test_a_layer_on_kernels_is_batch_norm_and_relu(forced):
    case = Case((6, 5, 4, 3), "rows", torch.float32, True, "relu", 4)
    x = case.tensor(0, 2.0)
    ours, theirs = SyncBatchNorm(5, activation="relu").to(DEVICE), nn.BatchNorm2d(5, eps=1e-3).to(DEVICE)
    left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    for _ in range(2):
        left.grad = right.grad = None
        y, expected = ours(left), theirs(right).relu()
        y.backward(case.tensor(1))
        expected.backward(case.tensor(1))
    assert all(forced)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-5)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


def rank_on_kernels(rank, world, sizes):
    fused.serves = lambda x: x.numel() > 0 and fused.rows_of(x) is not None
    case = Case((sum(sizes), 6, 3, 2), "rows", torch.float32, True, "relu", 5)
    first = sum(sizes[:rank])
    x = case.tensor(0, 50.0)[first : first + sizes[rank]].requires_grad_()
    layers = [SyncBatchNorm(4).to(DEVICE), SyncBatchNorm(6).to(DEVICE)]  # the first one's channels are a slice
    level = SyncBatchNorm.begin_level(layers, [x[:, 1:5], x], (), "relu")
    ys = level.finish()
    dy = case.tensor(1)[first : first + sizes[rank]]
    torch.autograd.backward(ys, [dy[:, :4], dy])
    found = [*ys, x.grad, *(b for layer in layers for b in layer.buffers())]
    return [value.detach().cpu().numpy() for value in found]


def test_ranks_on_kernels_are_one_batch_whatever_their_shares():
    """Empty ones, too, which plain operations serve."""
    (whole,) = run_ranks(1, with_group, rank_on_kernels, (5,))
    for sizes in ((3, 2), (1, 0, 4)):
        ranks = run_ranks(len(sizes), with_group, rank_on_kernels, sizes)
        for number, value in enumerate(whole):
            parts = [torch.from_numpy(rank[number]) for rank in ranks]
            expected = torch.from_numpy(value)
            for part in [torch.cat(parts)] if number < 3 else parts:
                torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-5)


def test_a_norm_of_single_activations_runs_on_the_same_kernels(forced):
    x = Case((6, 5, 3, 4), "rows", torch.float32, True, "relu", 4).tensor(0, 2.0)
    dy = Case((6, 5, 3, 4), "rows", torch.float32, True, "relu", 4).tensor(1)
    found = []
    for kernels in (True, False):
        if not kernels:
            fused.serves = lambda x: False  # the fixture puts it back
        layer, given = PerActivationNorm((5, 3, 4)).to(DEVICE), x.clone().requires_grad_()
        y = nn.functional.relu(layer(given), inplace=True)
        y.backward(dy)
        found.append([y, given.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    assert forced
    assert all(forced)
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_what_comes_out_may_be_changed_in_place(forced):
    """As activations of torchvision's networks do."""
    torch.manual_seed(0)
    x = Case((4, 3, 6, 6), "rows", torch.float32, True, None, 7).tensor(0)
    network = convert(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace=True))).to(DEVICE)
    network.to(memory_format=torch.channels_last)(x).square().sum().backward()
    assert any(forced)
    gradient = network[0].weight.grad.clone()
    network.zero_grad()
    forced.append("apart")
    fused.serves = lambda x: False  # the fixture puts it back
    network(x).square().sum().backward()
    torch.testing.assert_close(gradient, network[0].weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("projection", [4, 0])
def test_branches_are_written_where_they_are_concatenated(forced, monkeypatch, projection):
    """A module on kernels copies no branch but a pool that is passed through; a module on plain operations all."""

    def results() -> list[torch.Tensor]:
        torch.manual_seed(0)
        widths = Widths(4 if projection else 0, 4, 6, 3, 5, "avg" if projection else "max", projection)
        module = Inception(8, widths, Style(SyncBatchNorm)).to(DEVICE, memory_format=torch.channels_last)
        x = Case((3, 8, 6, 6), "rows", torch.float32, True, None, 9).tensor(0).requires_grad_()
        y, _ = module(x)
        weight = torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y)
        y.backward(weight.contiguous(memory_format=torch.channels_last))
        return [y.detach(), x.grad, *(p.grad for p in module.parameters()), *module.buffers()]

    joined: list[int] = []
    cat, copy = torch.cat, torch.Tensor.copy_

    def seen(tensors, dim=0):
        joined.extend([1] * len(tensors) if tensors[0].dim() == 4 else [])
        return cat(tensors, dim)

    def copied(self, source, *rest):
        joined.extend([1] if self.dim() == 4 else [])
        return copy(self, source, *rest)

    monkeypatch.setattr(torch, "cat", seen)
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    ours = results()
    assert sum(joined) == (0 if projection else 1)
    assert any(forced)
    fused.serves = lambda x: False  # the fixture puts it back
    joined.clear()
    for mine, other in zip(ours, results(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
    assert sum(joined) == (4 if projection else 3)


def test_saved_tensors_that_come_back_otherwise_give_the_same_gradients(forced):
    """torch.autograd.graph.save_on_cpu forgets how a tensor lay; the mask of the ReLU must not go with it."""
    case = Case((4, 3, 5, 5), "rows", torch.float32, True, "relu", 8)
    gradients = []
    for unpack in (lambda t: t, lambda t: t.clone(memory_format=torch.contiguous_format)):
        x = case.tensor(0).requires_grad_()
        layer = SyncBatchNorm(3, activation="relu").to(DEVICE)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            layer(x).backward(case.tensor(1))
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_a_machine_on_which_triton_cannot_compile_says_so_once_and_goes_on(monkeypatch):
    def broken(x):
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(fused, "packet", broken)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: torch.empty(size))
    fused._runs.cache_clear()
    with pytest.warns(UserWarning, match=r"not available on GPU 0 \(Failed to find C compiler.\): plain operations do"):
        assert not fused._runs(0)
    assert not fused._runs(0)
    fused._runs.cache_clear()


def test_eps_and_momentum_are_not_rounded_to_float32():
    known = fused.statistics(torch.zeros(1, 3, dtype=torch.float64, device=DEVICE), None, 1e-3, torch.float32, None)
    assert known.invstd_C.item() == 1 / 1e-3**0.5


def test_bits_repeat():
    case = Case((8, 5, 6, 6), "rows", torch.float32, True, "relu", 6)
    first, second = (fused.packet(case.tensor(0)) for _ in range(2))
    assert torch.equal(first, second)
    assert Moments(first[0], first[1:6], first[6:]).count == 288


COMPILED = """
import itertools, json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from pipeline.norm import kernels
doubles = {"packet_P", "rows_RP", "sums_2C", "totals_RP", "invstd", "count"}
values, constants_of = {"x", "dy", "y", "dx"}, {"BLOCK_M": 16, "BLOCK_C": 128, "EPS": 1e-3, "MOMENTUM": 0.1}
found = []
for name, kernel in sorted(vars(kernels).items()):
    if type(kernel).__name__ != "JITFunction":
        continue
    flags = [a for a in kernel.arg_names if a.isupper() and a not in constants_of]
    for kind, arch, each in json.loads(sys.argv[1]):
      for chosen in itertools.product((False, True) if each else (True,), repeat=len(flags)):
        signature, constants = {}, {}
        for place, argument in enumerate(kernel.arg_names):
            if argument.isupper():
                constants[(place,)] = (constants_of | dict(zip(flags, chosen)))[argument]
                signature[argument] = "constexpr"
            elif argument in ("stride", "rows", "channels", "share", "parts", "ranks") or argument.endswith("_stride"):
                signature[argument] = "i32"
            else:
                pointee = "fp64" if argument in doubles else kind if argument in values else "fp32"
                signature[argument] = "*" + ("i64" if argument == "batches" else pointee)
        source = ASTSource(kernel, signature, constexprs=constants)
        made = compile(source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": False})
        found.append([name, kind, arch, len(made.asm["cubin"]), "fma.rn.f32" in made.asm["ptx"]])
print(json.dumps(found))
"""


def test_every_kernel_compiles_for_a100_and_h100_without_one(tmp_path):
    """The interpreter takes what the compiler would refuse; its machine code needs no device."""
    variants = [["fp16", 80, False], ["fp32", 90, False], ["bf16", 90, True]]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED, json.dumps(variants)], check=True, capture_output=True,
        text=True, env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, timeout=240,
    )  # fmt: skip
    found = json.loads(ran.stdout)
    names = {name for name, *_ in found}
    assert len(names) == 8
    # In bf16 with every combination of its flags: three of `statistics`, two of three others.
    assert len(found) == 8 + 8 + (4 + 8 + 3 * 4)
    for name, (kind, arch, _) in itertools.product(names, variants):
        assert any(row[:3] == [name, kind, arch] and row[3] > 1000 for row in found)
    assert not any(fused for *_, fused in found)  # a product and a sum stay two roundings
