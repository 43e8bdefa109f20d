"""W&B tells a person what goes wrong in a real run."""

import pytest

from tests.callbacks.test_wandb_reporter import server
from tests.multiprocess.test_failures import WATCHED, train

__all__ = ["server", "train"]


@pytest.mark.parametrize(
    ("fault", "code", "title", "text"),
    [
        ("no_number:4", 1, "run: bad loss", "the loss is no number in step 4"),
        ("sleep_in_forward:4", 75, "run: stands still", "rank 1 of 2"),
    ],
)
def test_wandb_tells_of_a_bad_loss_and_of_a_stall_once(train, server, fault, code, title, text):
    ended = train(fault, WATCHED, "tracking.mode=online", "tracking.goodput_alert=0.9", devices=2)
    assert ended.code == code
    ((told, said),) = [(alert["title"], alert["text"]) for alert in server.run.alerts]
    assert told == title
    assert text in said
    if code == 1:  # else its rank 0 stood, too, and could not say how it ended
        assert server.run.exit_code == 1
    assert f"go on with: pipeline train {ended.directory}/config.yaml" in said
