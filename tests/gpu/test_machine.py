"""What NVIDIA's driver says of real GPUs, by way of its library."""

import pytest
import torch

from pipeline.callbacks.machine import OF_A_GPU, Gpus

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_a_gpu_tells_what_it_does():
    gpus = Gpus()
    assert len(gpus.handles) >= torch.cuda.device_count()
    held = torch.zeros(2**28, device="cuda")  # 1 GiB
    torch.cuda.synchronize()
    found = gpus.read()
    assert set(found) <= {f"gpu{gpu}_{name}" for gpu in gpus.handles for name in OF_A_GPU}
    of_one = [{name: found.get(f"gpu{gpu}_{name}") for name in OF_A_GPU} for gpu in gpus.handles]
    for each in of_one:  # a part of a GPU (MIG) does not tell its use, for one
        assert each["use"] is None or 0 <= each["use"] <= 1
        assert each["celsius"] is None or 0 < each["celsius"] < 120
    assert sum(each["memory_used_gb"] or 0 for each in of_one) > held.nbytes / 1e9
