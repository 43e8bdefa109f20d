"""What W&B keeps of a run beside its rows: the data set that it took, best and last checkpoint, changes of its code.

All of it is found in the run's directory, so that a start at its end, an interrupted one and `pipeline sync` send the
same, each once. By default W&B gets names, digests and places: no file leaves the machine unless it is asked for.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wandb

from pipeline.callbacks.journal import Row, read_journal
from pipeline.launch.code_state import CODE
from pipeline.launch.plan import numbered_checkpoints, read_record

NONE, DIGESTS, FILES = "none", "digests", "files"  # tracking.artifacts
_MANIFEST = "dataset.json"  # of the run's data set, in its directory
_BEST = "best.ckpt"  # as training/checkpoint.py has it, whose import takes seconds


@dataclass(frozen=True, slots=True)
class Kept:
    """A version of an artifact. name: of all its versions. entry: of the file within it."""

    name: str
    kind: str  # dataset, model or code
    path: Path
    entry: str
    aliases: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    is_input: bool = False

    @property
    def key(self) -> str:
        return f"{self.name}:{self.aliases[0]}"


def kept(directory: Path, wandb_id: str, data: str) -> list[Kept]:
    """All that there is now, `latest` last. directory: the run's. data: the name of its data set."""
    found = []
    if (path := directory / _MANIFEST).is_file():
        known = json.loads(path.read_text())
        digest = str(known.get("digest", ""))
        found.append(Kept(f"dataset-{_name(data)}", "dataset", path, _MANIFEST, (f"digest-{digest[:12]}",),
                          {"digest": digest}, is_input=True))  # fmt: skip
    newest = read_record(directory).starts[-1:]
    code = str(newest[0].get("code", "")) if newest else ""
    if newest and newest[0].get("changed") and (path := directory / CODE / f"{code}.diff").is_file():
        about = {"commit": newest[0].get("commit"), "digest": code}
        found.append(Kept(f"code-{wandb_id}", "code", path, "changes.diff", (f"digest-{code}",), about))
    return found + _checkpoints(directory, wandb_id)


def _checkpoints(directory: Path, wandb_id: str) -> list[Kept]:
    """The best, then the last; in W&B one version where they are the same bytes, for a file's name is not in them."""
    name, journal = f"checkpoint-{wandb_id}", directory / "metrics.csv"
    validated = [row for row in (read_journal(journal) if journal.exists() else ()) if row.split == "val"]
    found, place = [], directory / "checkpoints"
    if (path := place / _BEST).is_file():
        row = max(validated, key=lambda row: row.top1, default=None)  # the first of equals, as Checkpoints has it
        found.append(Kept(name, "model", path, "model.ckpt", ("best", *_step(row)), _scores(row)))
    if numbered := numbered_checkpoints(directory):
        step = max(numbered)
        row = next((row for row in validated if row.step == step), None)
        found.append(Kept(name, "model", numbered[step], "model.ckpt", ("last", f"step-{step}"),
                          {"step": step} | _scores(row)))  # fmt: skip
    return found


def _step(row: Row | None) -> tuple[str, ...]:
    return (f"step-{row.step}",) if row else ()


def _scores(row: Row | None) -> dict[str, Any]:
    return {"step": row.step, "top1": row.top1, "top5": row.top5, "loss": row.loss} if row else {}


def _name(text: str) -> str:
    """As W&B lets an artifact be called."""
    return re.sub(r"[^\w.-]", "-", text)


class Artifacts:
    """Sends them beside the training: at a start what it takes in, at its end what it leaves.

    W&B's client waits without end where a server takes a question and never answers it, so that every call is made in a
    thread for which nobody has to wait.
    """

    def __init__(self, directory: Path, wandb_id: str, data: str, how: str):
        """how: digests or files."""
        self.directory, self.wandb_id, self.data, self.how = directory, wandb_id, data, how
        self._confirmed = directory / "wandb" / "artifacts.json"  # digests by Kept.key
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def missing(self) -> list[Kept]:
        """What W&B has not confirmed yet."""
        known = self._known()
        return [each for each in self._kept() if self._made(each).digest != known.get(each.key)]

    def begin(self, run: Any) -> None:
        """Name the run's inputs, while it goes on. run: of W&B's client, online."""
        self._start(run, inputs_alone=True)

    def end(self, run: Any, seconds: float) -> str:
        """Send what is missing; returns why it is not all there, "" if it is."""
        until = time.monotonic() + seconds
        if self._thread is not None:  # whatever has become of it: what it did not do is still missing
            self._thread.join(seconds)
        if self._thread is None or not self._thread.is_alive():
            self._start(run, inputs_alone=False).join(max(0.0, until - time.monotonic()))
        if self._thread is not None and self._thread.is_alive():
            return f"no answer within {seconds:g} s"
        return str(self._error).strip() or type(self._error).__name__ if self._error else ""

    def _start(self, run: Any, *, inputs_alone: bool) -> threading.Thread:
        self._error = None
        self._thread = threading.Thread(target=self._send, args=(run, inputs_alone), name="artifacts", daemon=True)
        self._thread.start()
        return self._thread

    def _send(self, run: Any, inputs_alone: bool) -> None:
        try:
            for each in self._kept():
                if inputs_alone and not each.is_input:
                    continue
                artifact = self._made(each)
                digest = artifact.digest
                if self._known().get(each.key) == digest:
                    continue
                if each.is_input:
                    run.use_artifact(artifact, aliases=list(each.aliases))
                else:
                    run.log_artifact(artifact, aliases=list(each.aliases)).wait()
                self._confirm(each, digest)
        except Exception as error:  # W&B's client has many; what is not confirmed is sent again
            self._error = error

    def _kept(self) -> list[Kept]:
        return kept(self.directory, self.wandb_id, self.data)

    def _made(self, each: Kept) -> wandb.Artifact:
        quiet()
        artifact = wandb.Artifact(each.name, each.kind, metadata=each.metadata)
        if self.how == FILES:  # neither copied before it is sent nor kept in a cache: whole checkpoints never change
            artifact.add_file(str(each.path), name=each.entry, policy="immutable", skip_cache=True)
        else:  # under another name, or W&B would take the file itself, sent later, for what it has already
            artifact.add_reference(each.path.resolve().as_uri(), name=f"elsewhere/{each.entry}")
        return artifact

    def _known(self) -> dict[str, str]:
        try:
            return dict(json.loads(self._confirmed.read_text()))
        except (OSError, ValueError):
            return {}

    def _confirm(self, each: Kept, digest: str) -> None:
        self._confirmed.parent.mkdir(exist_ok=True)
        temporary = self._confirmed.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._known() | {each.key: digest}, indent=2) + "\n")
        temporary.replace(self._confirmed)


def artifacts(directory: Path, wandb_id: str, data: str, how: str) -> Artifacts | None:
    """Those of a run, unless W&B is to have none."""
    return None if how == NONE else Artifacts(directory, wandb_id, data, how)


def quiet() -> None:
    """Before anything is asked of W&B's client: once it is there it takes no more notice of these, and says so."""
    os.environ.setdefault("WANDB_SILENT", "true")
    # Telemetry of W&B's client: towards a server that accepts and never answers it held a process for 22 s at its end.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
