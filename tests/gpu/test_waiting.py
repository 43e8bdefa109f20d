import time

import pytest
import torch

from pipeline.norm.waiting import Waiting

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_what_a_stream_stands_in_is_measured_while_the_host_goes_on():
    device, stands = torch.device("cuda"), Waiting()
    stands.on = True
    torch.cuda.synchronize()
    began = time.perf_counter()
    mark = stands.begin(device)
    torch.cuda._sleep(200_000_000)  # a tenth of a second, on the device
    stands.end(mark)
    assert time.perf_counter() - began < 0.05
    assert 0.05 < stands.taken() < 1.0
    assert time.perf_counter() - began > 0.05
