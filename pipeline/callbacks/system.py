"""system/node-<n>.csv: what every node is doing, written by one thread a node beside the training.

W&B gets it from the leading rank, which reads the files of all nodes: each sample goes with the next row. Its client's
own way, a writer a node in mode "shared", is closed to a run that goes on: there `log` ignores the step that it is
given (wandb 0.31), by which rows are found again after a restart; it needs a server, and each writer a process.
"""

from __future__ import annotations

import csv
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import lightning

from pipeline.callbacks.machine import Figures, Machine

DIRECTORY = "system"  # of a run
FIRST_SECONDS = 1.0  # after which a start takes its first sample, however far they are apart: short runs have one, too
_TAIL = 8192  # bytes, in which a line is sure to end and another to begin


class System(lightning.Callback):
    """Samples this node every so many seconds, from a thread; nothing of it is in a step. For local rank 0 of a node.

    tell: for the rank that reports, gets what all nodes did by its names in W&B, after each `every_steps`-th step. A
    directory that cannot be written costs samples, never the training.
    """

    def __init__(
        self, run: Path, *, node: int, every_seconds: float, every_steps: int = 1,
        tell: Callable[[Figures], object] | None = None,
    ):  # fmt: skip
        self.run, self.node, self.every_seconds = run, node, every_seconds
        self.every_steps, self.tell = every_steps, tell
        self._news: queue.SimpleQueue[Figures] = queue.SimpleQueue()
        self._step = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = trainer.global_step
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, name="system", daemon=True)
        self._thread.start()

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: object) -> None:
        if self.tell is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step % self.every_steps == 0 and not self._news.empty():
            figures: Figures = {}
            with suppress(queue.Empty):
                while True:
                    figures |= self._news.get_nowait()
            self.tell(figures)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._end()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5.0)  # a file server that hangs is no reason to wait for it
            self._thread = None

    def _watch(self) -> None:
        machine, nodes = Machine(self.run), Nodes(self.run / DIRECTORY)
        if self.tell is not None:
            nodes.news()  # of earlier starts, of which W&B knows
        table: Table | None = None
        seconds = min(FIRST_SECONDS, self.every_seconds)
        while not self._stop.wait(seconds):
            seconds = self.every_seconds
            with suppress(OSError):
                table = table or Table(self.run / DIRECTORY / f"node-{self.node}.csv", machine.names)
                table.append(machine.sample())
            if self.tell is not None:
                self._news.put(nodes.news())


class Table:
    """A node's file, gone on with: lines of earlier starts stay, since time is not undone as steps are."""

    def __init__(self, path: Path, names: Sequence[str]):
        self.path, self.columns, self._host = path, ("at", "host", *names), socket.gethostname()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")  # GPUs may come and go
            writer.writeheader()
            writer.writerows(whole_lines(path))
        temporary.replace(path)

    def append(self, sample: Figures) -> None:
        values = (f"{sample[name]:.4g}" if name in sample else "" for name in self.columns[2:])
        with self.path.open("a") as file:
            file.write(",".join([f"{time.time():.1f}", self._host, *values]) + "\n")


def whole_lines(path: Path) -> list[dict[str, str]]:
    """Samples of a node's file by column, without a line that a kill cut short; none where there is no such file."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [line for line in csv.DictReader(lines) if None not in line and None not in line.values()
            and _number(line.get("at")) is not None]  # fmt: skip


class Nodes:
    """The files of all nodes, as far as this one sees them. directory: where they are."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._told: dict[str, str] = {}  # the time of the newest sample, by the name of its file

    def news(self) -> Figures:
        """The newest sample of each node that has one since the last call, by its names in W&B."""
        found: Figures = {}
        for path in sorted(self.directory.glob("node-*.csv")):
            with suppress(OSError, ValueError, LookupError, StopIteration, csv.Error):
                columns, line = _ends(path)
                sample = dict(zip(columns, line, strict=True))
                if self._told.get(path.name) != sample["at"]:
                    self._told[path.name] = sample["at"]
                    found |= {wandb_name(name, path.stem): float(sample[name]) for name in columns[2:] if sample[name]}
        return found


def _ends(path: Path) -> tuple[list[str], list[str]]:
    """The header and the newest whole line, without what is between: a file of a month has 15 MB."""
    with path.open("rb") as file:
        columns = file.readline().decode()
        begin = file.tell()
        end = file.seek(0, 2)
        file.seek(max(begin, end - _TAIL))
        tail = file.read().decode(errors="replace")
    whole = tail[: tail.rfind("\n") + 1].splitlines()
    return next(csv.reader([columns])), next(csv.reader(whole[-1:]))


def wandb_name(name: str, node: str) -> str:
    """All nodes of a figure side by side: W&B draws them as one panel by the pattern system/cpu/.*"""
    return f"{DIRECTORY}/{name}/{node}"


def _number(text: str | None) -> float | None:
    with suppress(ValueError, TypeError):
        return float(text or "")
    return None
