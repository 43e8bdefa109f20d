"""What every node is doing, looked at by one thread a node beside the training: into system/node-<n>.csv, and W&B.

W&B gets it from the leading rank, which reads the files of all nodes: each sample goes with the next row. Its client's
own way, a writer a node in mode "shared", is closed to a run that goes on: there `log` ignores the step that it is
given (wandb 0.31), by which rows are found again after a restart; it needs a server, and each writer a process.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import lightning

from pipeline.callbacks.machine import Figures, Machine
from pipeline.callbacks.samples import DIRECTORY, Nodes, Table

FIRST_SECONDS = 1.0  # after which a start takes its first sample, however far they are apart: short runs have one, too


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
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = trainer.global_step
        self.start()

    def start(self) -> None:
        """Begin to sample."""
        self._ended = threading.Event()  # its own: one that hangs in a file system ends when it comes back
        self._thread = threading.Thread(target=self._watch, args=(self._ended,), name="system", daemon=True)
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
        self.stop()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Sample no more."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(5.0)  # a file server that hangs is no reason to wait for it
            self._thread = None

    def _watch(self, ended: threading.Event) -> None:
        machine, nodes = Machine(self.run), Nodes(self.run / DIRECTORY)
        if self.tell is not None:
            nodes.news()  # of earlier starts, of which W&B knows
        table: Table | None = None
        seconds = min(FIRST_SECONDS, self.every_seconds)
        while not ended.wait(seconds):
            seconds = self.every_seconds
            with suppress(Exception):  # whatever it is: a watcher ends no training, and tries again
                table = table or Table(self.run / DIRECTORY / f"node-{self.node}.csv", machine.names)
                table.append(machine.sample())
            if self.tell is not None:
                self._news.put(nodes.news())
