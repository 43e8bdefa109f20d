"""Loaders that Lightning can stop and continue: a position is (epoch, global sample index), the same on every rank.

An item of a loader is a rank's whole share of one (micro-)batch, computed from its place alone, so
torch's DataLoader may use any number of workers without changing what is trained on.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
from torch.utils.data import DataLoader, Dataset

from pipeline.data.augment import Augmentation, CentreCrop
from pipeline.data.batch import Batch, collate, micro_batches, rank_places, share
from pipeline.data.decode import DecodeError, Pixels, decode
from pipeline.data.keyed_random import mixed
from pipeline.data.order import Order
from pipeline.data.shards import DataError, Split, load_split, read_manifest
from pipeline.data.stream import ShardStream

_AUGMENT = 3  # what a key is for; order.py has 1 and 2
_POPULATION_EPOCH = -1


@dataclass(frozen=True, slots=True)
class Batching:
    """How images are dealt out: the global batch over ranks and micro-batches, in an order keyed by the seed."""

    global_batch_size: int
    micro_batch_size: int = 0  # images a rank holds at once; 0 = its whole share
    world: int = 1
    rank: int = 0
    seed: int = 0
    window: int = 0  # shards shuffled together; 0 = all
    workers: int = 0

    @property
    def pieces(self) -> int:
        """Micro-batches a global batch is cut into: forward and backward passes an optimizer step."""
        return micro_batches(self.global_batch_size, self.world, self.micro_batch_size)


class _Images:
    """Decoded images of a split by sample number."""

    def __init__(self, split: Split):
        self.split, self.stream = split, ShardStream(split)

    def pixels(self, sample: int) -> Pixels:
        try:
            return decode(self.stream.read(sample))
        except DecodeError as error:
            shard = self.split.shards[int(self.split.shard_S[sample])]
            raise DataError(
                f"{shard}: image {self.split.key[sample]} does not decode: {error}; "
                f"run `pipeline shards verify --decode {shard.parent}`"
            ) from None


class _TrainShares(Dataset[Batch]):
    """A rank's share of every micro-batch of one epoch, by number."""

    def __init__(self, images: _Images, order: Order, augment: Augmentation, batching: Batching, epoch: int):
        self.images, self.order, self.augment, self.batching, self.epoch = images, order, augment, batching, epoch

    def __getitem__(self, number: int) -> Batch:
        b = self.batching
        step, piece = divmod(number, b.pieces)
        places = rank_places(b.global_batch_size, b.pieces, piece, b.world, b.rank)
        samples = [self.order.sample(self.epoch, step * b.global_batch_size + place) for place in places]
        keys = [mixed(b.seed, self.epoch, sample, _AUGMENT) for sample in samples]
        pixels = [self.augment(self.images.pixels(s), key) for s, key in zip(samples, keys, strict=True)]
        labels = [int(self.images.split.label_S[s]) for s in samples]
        return collate(pixels, labels, keys, samples, self.augment.size)


class TrainLoader:
    """Micro-batches of the epochs, one epoch an iteration; whole global batches only, the rest of an epoch is left out.

    Its state names the next sample. It advances when a batch is handed out, so it is right wherever
    every batch handed out has been trained on: at the end of an optimizer step.
    """

    def __init__(self, images: _Images, augment: Augmentation, batching: Batching):
        self.images, self.augment, self.batching = images, augment, batching
        self.order = Order(images.split.shard_counts, seed=batching.seed, window=batching.window)
        self.epoch, self.number = 0, 0  # number: of the next micro-batch of the epoch
        self.steps = len(images.split) // batching.global_batch_size
        self.dropped = len(images.split) - self.steps * batching.global_batch_size
        if not self.steps:
            raise DataError(
                f"data.global_batch_size = {batching.global_batch_size} exceeds the {len(images.split)} training "
                "images, so that an epoch has no step; lower it"
            )

    def __len__(self) -> int:
        return self.steps * self.batching.pieces

    def __iter__(self) -> Iterator[Batch]:
        dataset = self._shares(self.epoch)
        numbers = range(self.number, len(self))
        for batch in _loader(dataset, numbers, self.batching.workers):
            self.number += 1
            if self.number == len(self):  # (epoch, end) is (epoch + 1, 0)
                self.epoch, self.number = self.epoch + 1, 0
            yield batch

    def population_batches(self, images: int) -> Iterator[Batch]:
        """Micro-batches for population statistics, at least `images` images over all ranks; moves nothing.

        They begin an order of their own, which depends on the seed alone: whoever estimates from the
        same weights, in training or later, gets the same statistics.
        """
        dataset = self._shares(_POPULATION_EPOCH)
        per_batch = self.batching.global_batch_size / self.batching.pieces
        count = min(len(self), -int(-images // per_batch))
        yield from _loader(dataset, range(count), self.batching.workers)

    def _shares(self, epoch: int) -> _TrainShares:
        return _TrainShares(self.images, self.order, self.augment, self.batching, epoch)

    def state_dict(self) -> dict[str, int]:
        sample = self.number // self.batching.pieces * self.batching.global_batch_size
        return {"epoch": self.epoch, "sample": sample, "global_batch_size": self.batching.global_batch_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["global_batch_size"] != self.batching.global_batch_size:
            raise DataError(
                f"data.global_batch_size = {self.batching.global_batch_size}, but the checkpoint was written with "
                f"{state['global_batch_size']}; it is part of what a run is: keep it, or start a new run"
            )
        self.epoch = state["epoch"]
        self.number = state["sample"] // self.batching.global_batch_size * self.batching.pieces


class _EvaluationShares(Dataset[Batch]):
    """A rank's share of every evaluation batch, by number: each image once, the last batch filled with padding."""

    def __init__(self, images: _Images, crop: CentreCrop, batching: Batching):
        self.images, self.crop, self.batching = images, crop, batching
        self.per_rank = -(-batching.global_batch_size // batching.world)
        if batching.micro_batch_size:
            self.per_rank = min(self.per_rank, batching.micro_batch_size)

    def __len__(self) -> int:
        return math.ceil(len(self.images.split) / (self.per_rank * self.batching.world))

    def __getitem__(self, number: int) -> Batch:
        whole = self.per_rank * self.batching.world
        first = number * whole
        mine = share(min(whole, len(self.images.split) - first), self.batching.world, self.batching.rank)
        samples = [first + place for place in mine]
        pixels = [self.crop(self.images.pixels(s)) for s in samples]
        labels = [int(self.images.split.label_S[s]) for s in samples]
        return collate(pixels, labels, [0] * len(samples), samples, self.crop.size, padded_to=self.per_rank)


class ImageData(lightning.LightningDataModule):
    """Training and validation loaders of one packed data set. Raises DataError."""

    def __init__(
        self,
        root: Path,
        *,
        num_classes: int,
        augment: Augmentation,
        crop: CentreCrop,
        batching: Batching,
        digest: str = "",
    ):
        super().__init__()
        self.root, self.num_classes, self.augment, self.crop, self.batching = root, num_classes, augment, crop, batching
        self.manifest = read_manifest(root)
        if digest and digest != self.manifest.digest:
            raise DataError(
                f"data.root = {root} holds another data set here than where the run was started; copy that one"
            )
        self._images: dict[str, _Images] = {}
        self.train_loader = TrainLoader(self._split("train"), augment, batching)

    def _split(self, name: str) -> _Images:
        if name not in self._images:
            self._images[name] = _Images(load_split(self.root, self.manifest, name, self.num_classes))
        return self._images[name]

    def __len__(self) -> int:
        """Micro-batches of a training epoch."""
        return len(self.train_loader)

    def state_dict(self) -> dict[str, int]:
        return self.train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        # Lightning hands a loader its state only where an epoch was left unfinished: a checkpoint of an epoch's end
        # would begin the first epoch's order again. It hands it to the data module always.
        self.train_loader.load_state_dict(state_dict)

    def keys(self, samples: list[int]) -> list[str]:
        """Names of training samples, for ledgers and error messages."""
        return [self._split("train").split.key[s] for s in samples]

    def train_dataloader(self) -> TrainLoader:
        return self.train_loader

    def val_dataloader(self) -> DataLoader[Batch]:
        dataset = _EvaluationShares(self._split("val"), self.crop, self.batching)
        return _loader(dataset, range(len(dataset)), self.batching.workers)


def _loader(dataset: Dataset[Batch], numbers: range, workers: int) -> DataLoader[Batch]:
    options: dict[str, Any] = {}
    if workers:
        options = {"prefetch_factor": 4, "multiprocessing_context": "forkserver", "worker_init_fn": _leave_signals}
    return DataLoader(dataset, batch_size=None, sampler=list(numbers), num_workers=workers, **options)


def _leave_signals(worker: int) -> None:
    """A worker goes on through Ctrl-C and the like, until the process it serves has saved and ends it."""
    for number in (signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
