"""A signal to the whole job, as schedulers send it: launcher, ranks, data workers, all of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pipeline.training.checkpoint import checkpoints


def descendants(process: int) -> list[int]:
    """Every process below one, read from /proc."""
    parents: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(status.parent.name))
    found, waiting = [], [process]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def test_a_sigterm_to_every_process_of_a_job_is_an_interruption_like_any_other(shards, tmp_path):
    words = ["recipe=bn_x5", "data=folder", f"data.root={shards}", "run.id=all", "data.image_size=16",
             "model.stem=small", "model.width=0.125", "data.global_batch_size=24", "trainer.max_epochs=500",
             "trainer.validate_every_epochs=0", "tracking.mode=disabled", "tracking.every_steps=1",
             "norm.precise_images=0", "cluster.accelerator=cpu", "cluster.devices=2", "cluster.workers=1",
             "trainer.threads=1"]  # fmt: skip
    run = subprocess.Popen([sys.executable, "-m", "pipeline", "train", *words], cwd=tmp_path,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    metrics = tmp_path / "runs" / "all" / "metrics.csv"
    try:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 8):
            assert run.poll() is None
            assert time.monotonic() < deadline, "the run did not start"
            time.sleep(0.1)
        for process in [run.pid, *descendants(run.pid)]:
            try:
                os.kill(process, signal.SIGTERM)
            except ProcessLookupError:
                continue
        output, _ = run.communicate(timeout=60)
    finally:
        run.kill()
        run.wait()
    assert run.returncode == 75, output
    assert "Traceback" not in output
    assert "its checkpoint is written; go on with: pipeline train" in output
    assert checkpoints(metrics.parent / "checkpoints")
