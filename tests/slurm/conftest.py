"""One cluster for all tests of this folder, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from tests.callbacks.wandb_server import WandbServer
from tests.slurm.cluster import SUBNET, UnavailableError, cluster

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def slurm() -> Iterator[Path]:
    """Its slurm.conf; SLURM_CONF is set."""
    raised = cluster()
    try:
        conf = raised.__enter__()
    except UnavailableError as error:
        pytest.skip(str(error))
    try:
        yield conf
    finally:
        raised.__exit__(None, None, None)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What jobs inherit: this source, wherever it is installed from."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")  # nodes have no name server to ask for each other's names


@pytest.fixture
def wandb_server(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server that the nodes can reach, and jobs are told of. Runs log to it with tracking.mode=online."""
    wandb.teardown()  # the doctor's client remembers the address of an earlier one
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with WandbServer(f"{SUBNET}.1") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server
    wandb.teardown()
