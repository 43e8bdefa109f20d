"""A sweep of W&B, asked as its agent asks: for the parameters of a run, and whether that run is to stop.

Three questions on the wire, and not `wandb agent` around the job: an agent asks anew whenever it starts, so a requeued
element would become another run; it needs the sweep's own command, and W&B on the batch shell of a container's host.
Python's side of the same questions is private, and moved between releases; the wire must serve agents of old ones.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline.callbacks.journal import Row
from pipeline.callbacks.wandb_server import ServerError, asked, understood

ASK_EVERY = 5.0  # seconds, as wandb's own agent
BEAT_EVERY, BEAT_SECONDS = 30.0, 10.0  # between two signs of life of a run, and for the answer to one
_LOOK = """query Sweep($entity: String, $project: String, $sweep: String!) {
  project(name: $project, entityName: $entity) { sweep(sweepName: $sweep) { name state config } }
}"""
_REGISTER = """mutation CreateAgent($host: String!, $projectName: String, $entityName: String, $sweep: String!) {
  createAgent(input: {host: $host, projectName: $projectName, entityName: $entityName, sweep: $sweep}) { agent { id } }
}"""
_HEARTBEAT = """mutation Heartbeat($id: ID!, $metrics: JSONString, $runState: JSONString) {
  agentHeartbeat(input: {id: $id, metrics: $metrics, runState: $runState}) { agent { id } commands }
}"""
_WHOM = "an agent "
_OVER = ("FINISHED", "CANCELED", "CANCELLED", "CRASHED")


class SweepError(Exception):
    """A sweep that gives no runs: the message says why, and the way out."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """Where it is in W&B. entity: None for that of the key."""

    entity: str | None
    project: str
    id: str

    def __str__(self) -> str:
        return "/".join(part for part in (self.entity, self.project, self.id) if part)

    @staticmethod
    def of(text: str, project: str = "") -> Sweep:
        """[[ENTITY/]PROJECT/]SWEEP, as `wandb agent` takes it. Raises SweepError."""
        parts = text.split("/")
        if not all(parts) or len(parts) > 3:
            raise SweepError(f"{text!r} is no sweep; write ENTITY/PROJECT/SWEEP, as `wandb sweep` prints it")
        *above, sweep = parts
        entity = above[0] if len(above) == 2 else None
        return Sweep(entity, above[-1] if above else project, sweep)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A run of a sweep. run: its id in W&B. parameters: as the sweep names them."""

    run: str
    agent: str
    parameters: dict[str, Any]


def parameters_of(sweep: Sweep, *, seconds: float) -> list[str]:
    """What a sweep that goes on varies, by name. Raises SweepError where there is none; ServerError."""
    variables = {"entity": sweep.entity, "project": sweep.project, "sweep": sweep.id}
    found = (asked("Sweep", _LOOK, variables, seconds=seconds).get("project") or {}).get("sweep")
    if not found:
        raise SweepError(f"W&B knows no sweep {sweep}; make one with `wandb sweep FILE.yaml`, which prints its name")
    if str(found.get("state")).upper() in _OVER:
        state = str(found["state"]).lower()
        raise SweepError(f"sweep {sweep} is {state}; make another with `wandb sweep FILE.yaml`, or resume it")
    try:
        config = yaml.safe_load(found.get("config") or "") or {}
    except yaml.YAMLError:
        config = {}  # the server made runs of it, and will say so where it cannot
    return _names(config.get("parameters") or {})


def _names(parameters: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, values in parameters.items():
        nested = values.get("parameters") if isinstance(values, dict) else None
        found += _names(nested, f"{prefix}{name}.") if nested else [prefix + name]
    return found


def draw(sweep: Sweep, *, seconds: float, patience: float, say: Callable[[str], object] = print) -> Drawn | None:
    """The next run of a sweep, as a new agent gets it; None where there are no more. Raises ServerError, SweepError.

    seconds: for an answer. patience: seconds for the sweep to have one, while it is paused or its search thinks.
    """
    variables = {"host": socket.gethostname(), "projectName": sweep.project, "entityName": sweep.entity,
                 "sweep": sweep.id}  # fmt: skip
    answer = asked("CreateAgent", _REGISTER, variables, seconds=seconds)
    agent = str(understood(lambda: answer["createAgent"]["agent"]["id"], _WHOM))
    until, waiting = time.monotonic() + patience, False
    while True:
        for command in commands(agent, {}, seconds=seconds):
            if command.get("type") in ("run", "resume"):
                return understood(lambda: _drawn(command, agent), _WHOM)  # noqa: B023  (called at once)
            if command.get("type") == "exit":
                return None
        if time.monotonic() > until:
            raise SweepError(f"sweep {sweep} has given no parameters for {patience:.0f} s; if it is paused, resume it "
                             f"with `wandb sweep --resume {sweep}`, and launch again")  # fmt: skip
        if not waiting:
            say(f"sweep {sweep} has no parameters yet; asking for {patience:.0f} s")
            waiting = True
        time.sleep(ASK_EVERY)


def commands(agent: str, running: dict[str, bool], *, seconds: float) -> list[dict[str, Any]]:
    """What W&B wants of an agent with these runs. Raises ServerError."""
    variables = {"id": agent, "metrics": "{}", "runState": json.dumps(running)}
    answer = asked("Heartbeat", _HEARTBEAT, variables, seconds=seconds)
    return understood(lambda: list(json.loads(answer["agentHeartbeat"]["commands"])), _WHOM)


def _drawn(command: dict[str, Any], agent: str) -> Drawn:
    return Drawn(command["run_id"], agent, {name: value["value"] for name, value in command["args"].items()})


class Agent:
    """The agent of a run while it trains, as a reporter of the leading rank. W&B may tell it to stop the run."""

    def __init__(self, agent: str, run: str, stop: Callable[[], object]):
        self.agent, self.run, self.stop = agent, run, stop
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="sweep", daemon=True)
        self._thread.start()

    def append(self, row: Row) -> None:
        """Nothing: W&B's client has the row."""

    def interrupted(self) -> None:
        """Nothing: the run comes back."""

    def close(self) -> None:
        self._ended.set()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_EVERY):
            with contextlib.suppress(ServerError):  # the run goes on without
                for command in commands(self.agent, {self.run: True}, seconds=BEAT_SECONDS):
                    kind = command.get("type")
                    if kind == "exit" or (kind == "stop" and command.get("run_id") == self.run):
                        self.stop()
                        return
