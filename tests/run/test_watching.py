"""What reporters hear of an end."""

import pytest

from pipeline.callbacks.preemption import InterruptedRunError
from pipeline.launch.failure import AGAIN, FailedRunError
from pipeline.launch.plan import STOPPED
from pipeline.run.watching import reporting


class Listener:
    def __init__(self, error: type[BaseException] | None = None):
        self.heard: list[str] = []
        self.error = error

    def interrupted(self) -> None:
        self.heard.append("interrupted")

    def close(self) -> None:
        self.heard.append("closed")
        if self.error:
            raise self.error


class Signal(BaseException):
    pass


@pytest.mark.parametrize(
    ("error", "heard"),
    [
        (Signal(), ["interrupted", "closed"]),  # before the first step, or in the last validation
        (FailedRunError("a rank is gone", code=AGAIN), ["interrupted", "closed"]),
        (InterruptedRunError("which has said so itself"), ["closed"]),
        (FailedRunError("a loss"), ["closed"]),
        (ValueError(), ["closed"]),
    ],
)
def test_an_end_after_which_the_run_goes_on_is_an_interruption(tmp_path, error, heard):
    listener = Listener()
    with pytest.raises(type(error)), reporting([listener], tmp_path):
        raise error
    assert listener.heard == heard


def test_one_that_somebody_stopped_does_not_go_on(tmp_path):
    listener = Listener()
    (tmp_path / STOPPED).touch()
    with pytest.raises(Signal), reporting([listener], tmp_path):
        raise Signal
    assert listener.heard == ["closed"]


def test_every_reporter_is_closed_in_order_even_if_a_signal_cuts_one_short(tmp_path):
    first, second = Listener(Signal), Listener()
    with pytest.raises(Signal), reporting([first, second], tmp_path):
        pass
    assert first.heard == second.heard == ["closed"]
