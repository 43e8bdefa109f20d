import time
from types import SimpleNamespace

import pytest

from pipeline.callbacks.throughput import Throughput


def trained(throughput: Throughput, steps: int, wait: float, work: float, step: int = 0) -> int:
    for _ in range(steps):
        time.sleep(wait)
        throughput.on_train_batch_start(None, None, None, 0)
        time.sleep(work)
        throughput.on_train_batch_end(None, None, None, None, 0)
        step += 1
    return step


def test_an_interval_knows_its_speed_and_its_share_of_waiting():
    throughput = Throughput(global_batch_size=10)
    throughput.on_train_start(SimpleNamespace(global_step=100), None)  # resumed: the hundred before do not count
    step = trained(throughput, 5, wait=0.03, work=0.01, step=100)
    images_per_s, waited = throughput.interval(step)
    assert 100 < images_per_s <= 250
    assert waited == pytest.approx(0.75, abs=0.15)


def test_with_a_row_at_every_step_waiting_still_counts():
    throughput = Throughput(global_batch_size=1)
    throughput.on_train_start(SimpleNamespace(global_step=0), None)
    shares = []
    for step in range(1, 4):
        trained(throughput, 1, wait=0.03, work=0.01)
        shares.append(throughput.interval(step)[1])
    assert min(shares) > 0.5
