"""What W&B keeps of a run beside its rows: the data set that it took, best and last checkpoint, changes of its code.

All of it is found in the run's directory, so that a start at its end, an interrupted one and `pipeline sync` send the
same, each once. By default W&B gets names, digests and places: no file leaves the machine unless it is asked for.
"""

from __future__ import annotations

import hashlib
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
from pipeline.callbacks.wandb_server import quiet
from pipeline.launch.code_state import CODE
from pipeline.launch.plan import numbered_checkpoints, read_record

NONE, DIGESTS, FILES = "none", "digests", "files"  # tracking.artifacts
_INPUT_SECONDS = 5.0  # for what was begun long ago
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
    """All that there is now, the last checkpoint behind the others. directory: the run's. data: its data set's name."""
    found = []
    if digest := _digest(path := directory / _MANIFEST):
        found.append(Kept(f"dataset-{_name(data)}", "dataset", path, _MANIFEST, (f"digest-{digest[:12]}",),
                          {"digest": digest}, is_input=True))  # fmt: skip
    changed = [start for start in read_record(directory).starts if start.get("changes")]
    for name, start in {str(start["changes"]): start for start in changed}.items():
        if (path := directory / CODE / name).is_file():
            about = {"commit": start.get("commit"), "digest": start.get("code")}
            found.append(Kept(f"code-{wandb_id}", "code", path, "changes.diff", (f"digest-{path.stem}",), about))
    return found + _checkpoints(directory, wandb_id)


def _digest(manifest: Path) -> str:
    """What a manifest calls its data set; "" where there is none that says so."""
    try:
        return str(json.loads(manifest.read_text())["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


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

    def __init__(self, directory: Path, wandb_id: str, data: str, how: str, where: str = ""):
        """how: digests or files. where: the server and project to which they go."""
        self.directory, self.wandb_id, self.data, self.how, self.where = directory, wandb_id, data, how, where
        self._confirmed = directory / "wandb" / "artifacts.json"  # by Kept.key: what W&B has, how, and where
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def missing(self, *, inputs_alone: bool = False) -> list[Kept]:
        """What W&B has not confirmed yet."""
        found = kept(self.directory, self.wandb_id, self.data)
        return [each for each in found if (each.is_input or not inputs_alone) and not self._has(each)]

    def begin(self, run: Any) -> None:
        """Name the run's inputs, while it goes on. run: of W&B's client, online."""
        self._start(run, inputs_alone=True)

    def end(self, run: Any, seconds: float, *, in_haste: bool = False) -> str:
        """Send what is missing; returns why it is not all there, "" if it is. in_haste: the last checkpoint first."""
        until = time.monotonic() + seconds
        if self._thread is not None:  # whatever has become of it: what it did not do is still missing
            self._thread.join(min(seconds, _INPUT_SECONDS))
        if self._thread is not None and self._thread.is_alive():
            return "no answer about the run's data set"
        self._start(run, inputs_alone=False, in_haste=in_haste).join(max(0.0, until - time.monotonic()))
        if self._thread is not None and self._thread.is_alive():
            return f"no answer within {seconds:g} s"
        return str(self._error).strip() or type(self._error).__name__ if self._error else ""

    def _start(self, run: Any, *, inputs_alone: bool, in_haste: bool = False) -> threading.Thread:
        self._error = None
        self._thread = threading.Thread(
            target=self._send, args=(run, inputs_alone, in_haste), name="artifacts", daemon=True
        )
        self._thread.start()
        return self._thread

    def _send(self, run: Any, inputs_alone: bool, in_haste: bool) -> None:
        try:
            missing = self.missing(inputs_alone=inputs_alone)
        except Exception as error:  # a directory that is no run's any more
            self._error = error
            return
        for each in reversed(missing) if in_haste else missing:
            try:
                self._send_one(run, each)
            except Exception as error:  # W&B's client has many; what is not confirmed is sent again
                self._error = self._error or error

    def _send_one(self, run: Any, each: Kept) -> None:
        identity, artifact = self._identity(each), self._made(each)
        if each.is_input:
            run.use_artifact(artifact, aliases=list(each.aliases))
        else:
            run.log_artifact(artifact, aliases=list(each.aliases)).wait()
        self._confirm(each, identity)

    def _made(self, each: Kept) -> wandb.Artifact:
        quiet()
        artifact = wandb.Artifact(each.name, each.kind, metadata=each.metadata)
        if self.how == FILES:  # neither copied before it is sent nor kept in a cache: whole checkpoints never change
            artifact.add_file(str(each.path), name=each.entry, policy="immutable", skip_cache=True)
        else:  # under another name, or W&B would take the file itself, sent later, for what it has already
            artifact.add_reference(each.path.resolve().as_uri(), name=f"elsewhere/{each.entry}")
        return artifact

    def _identity(self, each: Kept) -> dict[str, str]:
        """Which file it is, without reading a checkpoint: those are written under a name once, and whole."""
        status = each.path.stat()
        content = f"{status.st_size} {status.st_mtime_ns}"
        if each.kind != "model":
            content = hashlib.sha256(each.path.read_bytes()).hexdigest()
        to = f"{os.environ.get('WANDB_BASE_URL', '')} {self.where}".strip()
        return {"content": content, "how": self.how, "to": to, "from": str(each.path.resolve())}

    def _has(self, each: Kept) -> bool:
        """Whether W&B has confirmed this file: as wanted, or as a file, which says more than where one lies."""
        wanted, known = self._identity(each), self._known().get(each.key)
        if not isinstance(known, dict) or any(known.get(name) != wanted[name] for name in ("content", "to")):
            return False
        return known.get("how") == FILES or (self.how != FILES and known.get("from") == wanted["from"])

    def _known(self) -> dict[str, Any]:
        """What was confirmed. A damaged file says nothing, and all is sent again, which W&B finds that it has."""
        try:
            known = json.loads(self._confirmed.read_text())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _confirm(self, each: Kept, identity: dict[str, str]) -> None:
        self._confirmed.parent.mkdir(exist_ok=True)
        temporary = self._confirmed.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._known() | {each.key: identity}, indent=2) + "\n")
        temporary.replace(self._confirmed)


def artifacts(directory: Path, wandb_id: str, data: str, how: str, where: str = "") -> Artifacts | None:
    """Those of a run, unless W&B is to have none."""
    return None if how == NONE else Artifacts(directory, wandb_id, data, how, where)
