"""What needs a CUDA device: the demo on it, bf16, the law with two ranks on it, no wait for it, a captured step.

The kernels against plain operations are tests/norm/test_kernels.py, which runs on a device where there is one.
"""

import subprocess
import sys

import pytest
import torch
from torch import nn

from pipeline import models
from pipeline.callbacks.journal import read_journal
from pipeline.norm import SyncBatchNorm, fused
from pipeline.norm.health import watch
from pipeline.norm.moments import batch_moments
from tests.multiprocess.test_law import EXACT, losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("default"),
]


def test_moments_and_layer_agree_with_the_cpu():
    x = torch.randn(9, 5, 6, 6, dtype=torch.float64) * 3 + 100
    on_gpu, on_cpu = batch_moments(x.cuda()), batch_moments(x)
    torch.testing.assert_close(on_gpu.mean_C.cpu(), on_cpu.mean_C, rtol=1e-12, atol=0)
    torch.testing.assert_close(on_gpu.m2_C.cpu(), on_cpu.m2_C, rtol=1e-10, atol=0)
    ours, theirs = SyncBatchNorm(5).double().cuda(), nn.BatchNorm2d(5, eps=1e-3).double().cuda()
    left, right = x.cuda().requires_grad_(), x.cuda().requires_grad_()
    ours(left).square().sum().backward()
    theirs(right).square().sum().backward()
    torch.testing.assert_close(left.grad, right.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_the_demo_runs_on_one_device(tmp_path, precision):
    words = ["recipe=bn_x5", "data=digits", "cluster.devices=1", "run.id=demo", f"trainer.precision={precision}"]
    subprocess.run([sys.executable, "-m", "pipeline", "train", *words], cwd=tmp_path, check=True)
    rows = read_journal(tmp_path / "runs" / "demo" / "metrics.csv")
    assert [row for row in rows if row.split == "val"][-1].top1 >= 0.97


@pytest.mark.parametrize("model", ["bn_inception", "inception"])
def test_two_ranks_on_one_device_obey_the_law(shards, tmp_path, model):
    on_gpu = ["cluster.accelerator=cuda", f"model.name={model}", "model.response_norm=true"]
    one = losses(shards, tmp_path, 1, *on_gpu)
    torch.testing.assert_close(losses(shards, tmp_path, 2, *on_gpu), one, **EXACT)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    made = models.build("bn_inception", num_classes=10, norm=SyncBatchNorm, width=0.25).cuda().to(dtype)
    return made.to(memory_format=torch.channels_last)


def batch(images: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(images, 3, 128, 128, device="cuda", generator=generator)
    return x.contiguous(memory_format=torch.channels_last), torch.arange(images, device="cuda") % 10


def step(net: nn.Module, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):  # a cache would not be captured
        loss = nn.functional.cross_entropy(net(x).main_NK, label)
    loss.backward()
    return loss


def test_a_step_runs_on_kernels_and_never_waits_for_the_device(monkeypatch):
    served: list[bool] = []
    serves = fused.serves
    monkeypatch.setattr(fused, "serves", lambda x: (served.append(serves(x)), served[-1])[1])
    net, (x, label) = network(), batch()
    step(net, x, label)  # compiles the kernels
    assert all(served)
    with watch(net) as watching:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(net, x, label)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(watching.read()) == 69


def test_kernels_and_plain_operations_train_alike(monkeypatch):
    losses = []
    for plainly in (False, True):
        with monkeypatch.context() as patch:
            if plainly:
                patch.setattr(fused, "serves", lambda x: False)
            net, (x, label) = network(), batch()
            optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
            for _ in range(5):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(net(x).main_NK, label)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[:5]), torch.tensor(losses[5:]), rtol=2e-2, atol=2e-2)
    assert abs(losses[0] - losses[5]) < 1e-4


def test_bits_repeat_on_a_device():
    gradients = []
    for _ in range(2):
        net, (x, label) = network(), batch()
        torch.use_deterministic_algorithms(True)
        try:
            step(net, x, label)
        finally:
            torch.use_deterministic_algorithms(False)
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_whole_step_is_captured_in_a_graph():
    net, (x, label) = network(), batch()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            net.zero_grad(set_to_none=True)
            step(net, x, label)
    torch.cuda.current_stream().wait_stream(stream)
    expected = [p.grad.clone() for p in net.parameters()]
    tracked = next(m for m in net.modules() if isinstance(m, SyncBatchNorm)).num_batches_tracked
    before = int(tracked)
    graph = torch.cuda.CUDAGraph()
    net.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = step(net, x, label)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.isfinite(loss)
    for value, other in zip((p.grad for p in net.parameters()), expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-4)
    assert int(tracked) == before + 1  # running statistics move with each replay
