"""However its processes were started, a run that is told to stop saves, ends, and goes on as the same run."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.launch.plan import read_record
from pipeline.training.checkpoint import checkpoints
from tests.multiprocess.test_resume import config, journal

PIPELINE = ["-m", "pipeline", "train"]


def alone(settings: Config) -> list[subprocess.Popen]:
    return [start([sys.executable, *PIPELINE], settings)]


def torchrun(settings: Config) -> list[subprocess.Popen]:
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={settings.world}"]
    return [start([*agent, *PIPELINE], settings)]


def one_by_one(settings: Config) -> list[subprocess.Popen]:
    """As srun starts tasks: each is told its place, and gets the signal itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(settings.world), "LOCAL_WORLD_SIZE": str(settings.world), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port}  # fmt: skip
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(settings.world)]
    return [start([sys.executable, *PIPELINE], settings, **shared, **rank) for rank in ranks]


def node_by_node(settings: Config) -> list[subprocess.Popen]:
    """As a container or a rented machine does it: each node is told its number, and starts its own ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    return [start([sys.executable, *PIPELINE], settings, PIPELINE_NODE=str(node), **shared)
            for node in range(settings.cluster.nodes)]  # fmt: skip


def start(command: list[str], settings: Config, **environment: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **environment}
    with (settings.directory / "output").open("a") as output:
        return subprocess.Popen([*command, str(settings.directory / "config.yaml")], env=environment,
                                stdout=output, stderr=output)  # fmt: skip


def ended(processes: list[subprocess.Popen]) -> list[int]:
    try:
        return [process.wait(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("begin", "world", "number", "code"),
    [
        (alone, 1, signal.SIGTERM, 75),
        pytest.param(alone, 1, signal.SIGINT, 75, marks=pytest.mark.slow),
        pytest.param(alone, 1, signal.SIGUSR2, 75, marks=pytest.mark.slow),
        (torchrun, 2, signal.SIGTERM, 1),  # torch's agent has no other code for a rank that failed
        pytest.param(torchrun, 2, signal.SIGINT, 1, marks=pytest.mark.slow),
        pytest.param(one_by_one, 2, signal.SIGTERM, 75, marks=pytest.mark.slow),
        (one_by_one, 2, signal.SIGUSR2, 75),
        (node_by_node, 2, signal.SIGTERM, 75),
        pytest.param(node_by_node, 2, signal.SIGINT, 75, marks=pytest.mark.slow),
    ],
)
def test_every_form_of_start_can_be_interrupted_and_goes_on(
    shards: Path, tmp_path: Path, begin: Callable[[Config], list[subprocess.Popen]], world: int, number: int, code: int
) -> None:
    words = ("trainer.max_epochs=24", "trainer.validate_every_epochs=0", "norm.precise_images=0")
    words += (f"cluster.nodes={world}", "cluster.devices=1") if begin is node_by_node else ()
    settings = config(shards, tmp_path, "run", world, *words)
    processes = begin(settings)
    metrics, deadline = settings.directory / "metrics.csv", time.monotonic() + 90
    try:
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 6):
            assert all(process.poll() is None for process in processes), (settings.directory / "output").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for process in processes:
            process.send_signal(number)
    finally:
        codes = ended(processes)
    output = (settings.directory / "output").read_text()
    assert codes == [code] * len(processes), output
    stopped = int(checkpoints(settings.directory / "checkpoints")[-1].stem[5:])
    assert 6 <= stopped < 24 * 5
    assert f"interrupted after step {stopped}; its checkpoint is written" in output
    assert read_record(settings.directory).starts[-1]["ended"] == "interrupted"

    assert ended(begin(config(shards, tmp_path, "run", world, *words))) == [0] * len(processes)
    assert [row[0] for row in journal(settings.directory)][:-1] == list(range(1, 24 * 5 + 1))
