from types import SimpleNamespace

import pytest
import torch

from pipeline.norm import waiting
from pipeline.norm.waiting import Waiting


class Event:
    """An event of a stream that can be read once it was waited for."""

    clock = 0.0

    def __init__(self, enable_timing):
        assert enable_timing
        self.at = self.seen = None

    def record(self):
        self.at = Event.clock

    def synchronize(self):
        self.seen = True

    def elapsed_time(self, other):
        assert other.seen
        return (other.at - self.at) * 1e3


def test_on_a_gpu_nothing_waits_for_the_device_until_the_seconds_are_taken(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: events.append(Event(**options)) or events[-1])
    device, stands = SimpleNamespace(type="cuda"), Waiting()
    stands.end(stands.begin(device))
    assert events == []  # off
    stands.on = True
    for seconds in (0.25, 0.5):
        mark = stands.begin(device)
        Event.clock += seconds
        stands.end(mark)
        Event.clock += 10.0  # of other work
    assert len(events) == 4
    assert not any(event.seen for event in events)
    assert stands.taken() == pytest.approx(0.75)
    assert stands.taken() == 0.0


def test_the_statistics_clock_is_off_where_nobody_asks():
    assert not waiting.STATISTICS.on
