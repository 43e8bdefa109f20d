"""What needs a CUDA device: the demo on it, bf16, and the law with two ranks that share it."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from pipeline.callbacks.journal import read_journal
from pipeline.norm import SyncBatchNorm
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
