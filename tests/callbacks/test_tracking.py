import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.callbacks.journal import Row
from pipeline.callbacks.tracking import WandbPlace, WandbReporter, wandb_mode

PLACE = WandbPlace(id="abc123", name="run", project="tests", entity=None, group="g", tags=["t"])


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_auto_is_online_with_a_key_and_offline_without(no_key, monkeypatch):
    assert wandb_mode("auto") == "offline"
    no_key.write_text("machine elsewhere.example login a password b\n")
    assert wandb_mode("auto") == "offline"
    no_key.write_text("machine api.wandb.ai login user password secret\n")
    assert wandb_mode("auto") == "online"
    no_key.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert wandb_mode("auto") == "online"
    assert wandb_mode("disabled") == "disabled"


def inspected(segment: Path) -> list[dict]:
    """The history of an offline segment, as W&B's own reader sees it."""
    wandb = Path(sys.executable).with_name("wandb")
    command = [str(wandb), "leet", "inspect", "--json", str(segment)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def test_an_offline_segment_holds_every_row_under_our_own_step(no_key, tmp_path):
    reporter = WandbReporter(PLACE, directory=tmp_path, mode="offline", config={"seed": 0})
    for step in (10, 20):
        reporter.append(
            Row(step=step, epoch=0.5, split="train", loss=1.0 / step, top1=0.25, top5=1, images=8, rate=0.1)
        )
    reporter.append(Row(step=20, epoch=1, split="val", loss=0.5, top1=0.75, top5=1, images=8))
    reporter.close()
    (segment,) = tmp_path.glob("wandb/offline-run-*-abc123/*.wandb")
    text = json.dumps(inspected(segment))
    for word in ("train/loss", "val/top1", "train/rate", "step", "0.05"):
        assert word in text
