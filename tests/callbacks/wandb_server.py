"""A W&B server on the loopback: as much of its protocol as the real client needs to begin, log, go on and end a run."""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.callbacks.wandb_artifacts import ArtifactStore

KEY = "k" * 39 + "7"


@dataclass
class StoredRun:
    project: str
    name: str
    history: list[dict] = field(default_factory=list)
    config: dict = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    preempting: bool = False
    exit_code: int | None = None
    sweep: str | None = None
    stopped: bool = False
    alerts: list[dict] = field(default_factory=list)

    def bucket(self, entity: str) -> dict:
        """What a resuming client reads: the number of lines of each stream, and the last line of the history."""
        tail = [json.dumps(line) for line in self.history[-1:]]
        return {
            "id": self.name, "name": self.name, "displayName": self.name, "summaryMetrics": "{}", "tags": [],
            "config": json.dumps(self.config), "wandbConfig": '{"t": 1}', "notes": None, "sweepName": self.sweep,
            "historyLineCount": len(self.history), "eventsLineCount": 0, "logLineCount": 0,
            "historyTail": json.dumps(tail), "eventsTail": "[]", "description": None,
            "project": {"id": self.project, "name": self.project, "entity": {"id": entity, "name": entity}},
        }  # fmt: skip


@dataclass
class StoredSweep:
    """parameters: of the runs that it has still to give. given: those that it gave, by run, in that order."""

    parameters: list[dict]
    names: list[str]
    state: str = "RUNNING"
    given: dict[str, dict] = field(default_factory=dict)
    agents: list[str] = field(default_factory=list)

    def config(self, command: list[str]) -> str:
        varied = {name: {"values": [0]} for name in self.names}
        return json.dumps({"method": "grid", "program": "none", "command": command, "parameters": varied})


@dataclass
class StoredView:
    """A workspace (project-view) or a report (runs). saves: how often it was sent."""

    id: str
    kind: str
    name: str
    title: str = ""
    spec: dict = field(default_factory=dict)
    saves: int = 0


class WandbServer(ArtifactStore):
    """fault: what is answered instead, by the name of the operation (every = all): a status, or seconds of delay."""

    entity = "someone"

    def __init__(self, host: str = "127.0.0.1", **fault: int | float):
        super().__init__()
        self.host = host
        self.runs: dict[str, StoredRun] = {}
        self.sweeps: dict[str, StoredSweep] = {}
        self.command: list[str] = []  # of every sweep, for `wandb agent`
        self.stop: set[str] = set()  # runs that their agents are told to stop
        self._one = threading.Lock()  # agent at a time
        self.projects: set[str] | None = None  # None: every project that is asked for
        self.views: list[StoredView] = []
        self.calls: Counter[str] = Counter()
        self.elsewhere = ""  # where a fault of 3xx sends the client
        self.received: list[bytes] = []
        self.fault: dict[str, int | float] = fault
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Quiet."""

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:
                    self.close_connection = True

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                server.received.append(body)
                if self.path == "/graphql":
                    query = json.loads(body)
                    named = re.search(r"(?:query|mutation)\s+(\w+)", query["query"])
                    self.answer(named[1] if named else "", query.get("variables") or {})
                elif self.path.endswith("/file_stream"):
                    self.answer("file_stream", json.loads(body) | {"run": self.path.split("/")[-2]})
                elif self.path.startswith("/storage/"):
                    server.calls["storage"] += 1
                    fault = server.fault.get("storage", server.fault.get("every", 0))
                    if isinstance(fault, float):
                        server.closed.wait(fault)
                    elif fault:
                        return self.reply(fault, {})
                    server.put(self.path, body)
                    self.reply(200, {})
                else:
                    self.reply(200, {})

            do_GET = do_PUT = do_POST

            def answer(self, operation: str, variables: dict) -> None:
                server.calls[operation] += 1
                fault = server.fault.get(operation, server.fault.get("every", 0))
                if isinstance(fault, float):
                    server.closed.wait(fault)
                elif fault:
                    return self.reply(fault, {"errors": [{"message": "as told"}]})
                reply = getattr(server, operation, dict)
                return self.reply(200, reply(variables) if reply is not dict else {"data": {}})

            def reply(self, status: int, answer: dict) -> None:
                data = json.dumps(answer).encode()
                self.send_response(status)
                if server.elsewhere:
                    self.send_header("Location", server.elsewhere)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.closed = threading.Event()
        self._http = ThreadingHTTPServer((host, 0), Handler)
        self._http.daemon_threads = True
        self._http.block_on_close = False

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self._http.shutdown()
        self._http.server_close()

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": f"http://{self.host}:{self._http.server_port}", "WANDB_API_KEY": KEY}

    @property
    def run(self) -> StoredRun:
        (run,) = self.runs.values()
        return run

    def steps(self) -> list[tuple[int, str]]:
        """(step, split) of the one run's history."""
        return [(r["step"], "val" if any(k.startswith("val/") for k in r) else "train") for r in self.run.history]

    def until(self, count: int, seconds: float = 20) -> None:
        """Wait for so many rows."""
        deadline = time.monotonic() + seconds
        while not self.runs or len(self.run.history) < count:
            assert time.monotonic() < deadline, f"{count} rows did not come"
            time.sleep(0.05)

    def Viewer(self, _: dict) -> dict:
        return {"data": {"viewer": {"id": "u", "entity": self.entity, "username": "u", "flags": "{}",
                                    "teams": {"edges": []}}}}  # fmt: skip

    def RunResumeStatus(self, variables: dict) -> dict:
        run = self.runs.get(variables["name"])
        entity = {"id": self.entity, "name": self.entity}
        return {"data": {"model": {"id": "p", "name": variables["project"], "entity": entity,
                                   "bucket": run.bucket(self.entity) if run else None}}}  # fmt: skip

    def UpsertBucket(self, variables: dict) -> dict:
        name = variables["name"]
        inserted = name not in self.runs
        run = self.runs.setdefault(name, StoredRun(variables.get("project") or "", name))
        run.config.update(json.loads(variables.get("config") or "{}"))
        run.sweep = variables.get("sweep") or run.sweep
        return {"data": {"upsertBucket": {"bucket": run.bucket(self.entity), "inserted": inserted}}}

    def sweep(self, *parameters: dict) -> StoredSweep:
        """Make one, `swept`, that gives these to as many runs."""
        names = list(dict.fromkeys(name for each in parameters for name in each))
        self.sweeps["swept"] = StoredSweep(list(parameters), names)
        return self.sweeps["swept"]

    def Sweep(self, variables: dict) -> dict:
        sweep = self.sweeps.get(variables["sweep"])
        found = sweep and {"id": "s", "name": variables["sweep"], "state": sweep.state, "runs": {"edges": []},
                           "config": sweep.config(self.command)}  # fmt: skip
        return {"data": {"project": {"sweep": found}}}

    SweepWithRuns = Sweep  # as wandb's own agent asks

    def CreateAgent(self, variables: dict) -> dict:
        sweep = self.sweeps[variables["sweep"]]
        with self._one:
            sweep.agents.append(f"{variables['sweep']}/{len(sweep.agents)}")
            return {"data": {"createAgent": {"agent": {"id": sweep.agents[-1]}}}}

    def Heartbeat(self, variables: dict) -> dict:
        name = variables["id"].partition("/")[0]
        sweep, running = self.sweeps[name], json.loads(variables["runState"])
        with self._one:
            commands: list[dict] = [{"type": "stop", "run_id": run} for run in running if run in self.stop]
            if not running and sweep.parameters:
                if sweep.state == "RUNNING":
                    run = f"drawn{len(sweep.given)}"
                    sweep.given[run] = sweep.parameters.pop(0)
                    values = {key: {"value": value} for key, value in sweep.given[run].items()}
                    commands = [{"type": "run", "run_id": run, "program": "none", "args": values}]
            elif not running:
                commands = [{"type": "exit"}]
        return {"data": {"agentHeartbeat": {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}}}

    def NotifyScriptableRunAlert(self, variables: dict) -> dict:
        self.runs[variables["runName"]].alerts.append(variables)
        return {"data": {"notifyScriptableRunAlert": {"success": True}}}

    def Views(self, variables: dict) -> dict:
        if self.projects is not None and f"{variables['entity']}/{variables['project']}" not in self.projects:
            return {"data": {"project": None}}
        nodes = [{"node": {"id": view.id, "name": view.name}} for view in self.views
                 if (view.kind, view.name) == (variables["type"], variables["view"])]  # fmt: skip
        return {"data": {"project": {"internalId": "77", "allViews": {"edges": nodes}}}}

    def UpsertView(self, variables: dict) -> dict:
        view = next((view for view in self.views if view.id == variables["id"]), None)
        inserted = view is None
        if view is None:
            view = StoredView(f"Vmlldzo{len(self.views)}==", variables["type"], variables["name"])
            self.views.append(view)
        view.title, view.spec, view.saves = variables["title"], json.loads(variables["spec"]), view.saves + 1
        return {"data": {"upsertView": {"view": {"id": view.id, "name": view.name}, "inserted": inserted}}}

    def CreateRunFiles(self, variables: dict) -> dict:
        files = [{"name": name, "uploadUrl": f"{self.environment['WANDB_BASE_URL']}/files/{name}"}
                 for name in variables["files"]]  # fmt: skip
        return {"data": {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}}

    def file_stream(self, body: dict) -> dict:
        run = self.runs[body["run"]]
        lines = (body.get("files") or {}).get("wandb-history.jsonl")
        if lines:
            assert lines["offset"] <= len(run.history), "a hole in the history"
            content = [json.loads(line) for line in lines["content"]]
            run.history[lines["offset"] : lines["offset"] + len(content)] = content
        for line in ((body.get("files") or {}).get("wandb-summary.json") or {}).get("content", ()):
            run.summary |= json.loads(line)
        run.preempting |= bool(body.get("preempting"))
        if body.get("complete"):
            run.exit_code = body.get("exitcode")
        return {"exitcode": None, "limits": {}, "stopped": run.stopped}
