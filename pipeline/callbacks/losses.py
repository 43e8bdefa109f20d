"""Losses that are no numbers, and spikes: noticed on the device, named, and kept out of every checkpoint.

No step waits for the device: it writes down the first bad step itself, a copy of that travels to the host
beside the training, and the agreement of all ranks carries it. Only a save waits, and looks at the weights, too.
A batch that is skipped is a step without gradients: counts, order, schedule and positions stay as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.callbacks.agreement import Agreement
from pipeline.callbacks.bad_samples import sum_over_ranks
from pipeline.callbacks.watchdog import note_failure
from pipeline.launch.failure import AGAIN, NOT_AGAIN, FailedRunError, NameSamples, shown
from pipeline.training.classifier import Classifier

WINDOW, FEWEST = 64, 16  # losses of which the median is taken; before there are so many nothing is a spike


class Losses(lightning.Callback):
    """Watches the loss of every step. spike_factor: times the running median; 0 = only what is no number.

    directory: the run's; skipped.jsonl there lists the steps that are not trained on, at this and every later start.
    steps: optimizer steps of an epoch. pieces: micro-batches of a step. tell: called by rank 0 with what was found.
    """

    def __init__(self, directory: Path, *, rank: int, world: int, host: str, on_nan: str, spike_factor: float,
                 steps: int, pieces: int, name: NameSamples,
                 tell: Callable[[str], object] = lambda text: None):  # fmt: skip
        self.tell = tell
        self.directory, self.rank, self.world, self.host = directory, rank, world, host
        self.on_nan, self.spike_factor, self.steps, self.pieces, self.name = on_nan, spike_factor, steps, pieces, name
        self.agreement = Agreement()
        self.skipped = read_skipped(directory)
        self._step = 0
        self._sum: Tensor | None = None  # of the micro-batches of a step
        self._first_2 = torch.tensor([-1.0, 0.0], dtype=torch.float64)  # the first bad step, from 1, and its loss
        self._host_2 = self._first_2
        self._ring = torch.full((WINDOW,), torch.nan, dtype=torch.float64)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = trainer.global_step
        self._first_2 = self._first_2.to(pl_module.device)
        self._ring = self._ring.to(pl_module.device)
        cuda = pl_module.device.type == "cuda"
        self._host_2 = torch.tensor([-1.0, 0.0], dtype=torch.float64).pin_memory() if cuda else self._first_2

    def state_dict(self) -> dict[str, Any]:
        return {"ring": self._ring.tolist()} if self.spike_factor else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._ring = torch.tensor(state_dict["ring"], dtype=torch.float64)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Classifier)
        skips = trainer.global_step + 1 in self.skipped
        if skips != pl_module.skips:
            pl_module.skips = skips
            if isinstance(trainer.strategy.model, DistributedDataParallel):  # it would wait for a backward
                trainer.strategy.model.require_backward_grad_sync = not skips

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Classifier)
        loss = None if pl_module.skips else outputs["loss"]
        if loss is not None:
            self._sum = loss.double() if self._sum is None else self._sum + loss
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._sum is None:
            return
        loss, self._sum = self._sum, None
        bad = ~torch.isfinite(loss)
        if self.spike_factor:
            bad |= self._is_spike(loss)
        newly = bad & (self._first_2[0] < 0)
        self._first_2.copy_(torch.where(newly, torch.stack([torch.full_like(loss, self._step), loss]), self._first_2))
        if self._host_2 is not self._first_2:
            self._host_2.copy_(self._first_2, non_blocking=True)

    def _is_spike(self, loss: Tensor) -> Tensor:
        mean = loss.clone()  # over ranks: of the global batch, the same number on each
        if self.world > 1:
            dist.all_reduce(mean)
            mean /= self.world
        known = (~self._ring.isnan()).sum()
        # By sorting, what is no number comes last: torch has no deterministic median of its own on every device.
        median = self._ring.sort().values.take((known - 1).clamp(min=0) // 2)
        spike = (known >= FEWEST) & (mean > self.spike_factor * median)
        kept = torch.where(spike | ~torch.isfinite(mean), torch.nan, mean)
        self._ring[self._step % WINDOW] = kept
        return spike

    def unsound(self) -> bool:
        """Whether a bad step of this rank is known on the host already; does not wait for the device."""
        return bool(self._host_2.numpy()[0] >= 0)

    def check(self, trainer: lightning.Trainer) -> None:
        """Before a save. Raises FailedRunError on all ranks if any has a bad loss or weights that are no numbers."""
        own = [t for t in (*trainer.lightning_module.parameters(), *trainer.lightning_module.buffers())
               if t.is_floating_point()]  # fmt: skip
        finite = torch.stack([torch.isfinite(t).all() for t in own]).all()
        values = [float(self._first_2[0] >= 0), float(~finite)]
        if any(sum_over_ranks(values, trainer.lightning_module.device)):
            self.refuse(trainer)

    def refuse(self, trainer: lightning.Trainer) -> None:
        """Name the first bad step and the ranks that had it. A collective; every rank raises FailedRunError."""
        step, loss = self._first_2.tolist()
        found = self.agreement.gather((self.rank, self.host, round(step), loss))
        bad = [entry for entry in found if entry[2] >= 0]
        if not bad:  # a step of finite loss broke the weights
            bad = [(rank, host, trainer.global_step, float("inf")) for rank, host, *_ in found]
            reason = "the weights are no numbers any more after"
        first = min(step for _, _, step, _ in bad)
        bad = [entry for entry in bad if entry[2] == first]
        finite = all(math.isfinite(loss) for *_, loss in bad)
        if any(entry[2] >= 0 for entry in found):
            reason = (
                f"the loss is over {self.spike_factor:g} times its median in" if finite else "the loss is no number in"
            )
        if finite:
            bad = [max(bad, key=lambda entry: float(entry[3]))]  # all agree on a spike: the one that had most of it
        ranks = [{"rank": rank, "host": host, "loss": repr(loss), "keys": self._keys(rank, first)}
                 for rank, host, _, loss in bad]  # fmt: skip
        text = f"{reason} step {first} (epoch {(first - 1) // self.steps + 1}): " + "; ".join(
            f"rank {r['rank']} of {self.world} on {r['host']} (loss {r['loss']}), samples {shown(r['keys'])}"
            for r in ranks[:4]
        )
        text += f"; and {len(ranks) - 4} more ranks" if len(ranks) > 4 else ""
        skip = self.on_nan == "skip"
        line = {"step": first, "epoch": (first - 1) // self.steps, "reason": reason, "ranks": ranks}
        if self.rank == 0:
            note_failure(self.directory / "logs", {"message": text, **line})
            if skip:
                with (self.directory / "skipped.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")
            self.tell(f"{text}; {_WAYS[skip]}")
        raise FailedRunError(
            f"{text}; {_WAYS[skip]}", code=AGAIN if skip else NOT_AGAIN, shared=True, restart=skip
        )  # fmt: skip

    def _keys(self, rank: int, step: int) -> list[str]:
        epoch, place = divmod(step - 1, self.steps)
        numbers = range(place * self.pieces, (place + 1) * self.pieces)
        return [key for number in numbers for key in self.name(rank, epoch, number)]


_WAYS = {
    False: "no checkpoint was written since; look at these samples, lower optimizer.rate, or go on without the batch "
           "with trainer.on_nan=skip",
    True: "the run goes back to its newest checkpoint and goes on without this global batch (skipped.jsonl)",
}  # fmt: skip


def read_skipped(directory: Path) -> set[int]:
    """Steps, from 1, that a run leaves out."""
    path = directory / "skipped.jsonl"
    return {int(json.loads(line)["step"]) for line in path.read_text().splitlines()} if path.exists() else set()
