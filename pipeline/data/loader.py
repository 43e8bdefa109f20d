"""Loaders that can stop and continue: a position is (epoch, global sample index), the same on every rank.

An item is a rank's whole share of one (micro-)batch, computed from its place alone, so worker processes
may be any number without changing what is trained on. They are started once and serve every epoch,
validation and estimate of statistics in turn. This file knows no Lightning: a worker imports it.
"""

from __future__ import annotations

import atexit
import math
import multiprocessing
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.util import Finalize
from typing import Any, NamedTuple, Protocol

from torch.utils.data import DataLoader, Dataset

from pipeline.data.augment import UNCHANGED, Augmentation, CentreCrop
from pipeline.data.batch import Batch, collate, micro_batches, rank_places, share
from pipeline.data.dataset import Dataset as Source
from pipeline.data.images import Fault, Images, open_images
from pipeline.data.keyed_random import mixed
from pipeline.data.mixing import partner
from pipeline.data.order import Order
from pipeline.data.parent import PREFETCHED, end_with_parent
from pipeline.data.read_ahead import ReadAhead
from pipeline.data.shards import DataError
from pipeline.data.split import Split

_AUGMENT = 3  # what a key is for; order.py has 1, 2 and 5, images.py 4
POPULATION_EPOCH = -1  # whose order the batches for population statistics have


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

    def first(self, number: int) -> int:
        """Place in the epoch of the global batch to which the number-th micro-batch belongs."""
        return number // self.pieces * self.global_batch_size

    def places(self, number: int, rank: int) -> range:
        """Places within that global batch that a rank has of the micro-batch."""
        return rank_places(self.global_batch_size, self.pieces, number % self.pieces, self.world, rank)


class Place(NamedTuple):
    """Which item: the number-th micro-batch of an epoch, or, in epoch None, the number-th of a validation."""

    epoch: int | None
    number: int


Item = tuple[Batch, list[Fault]]


def planned(order: Order, batching: Batching, epoch: int, number: int, rank: int) -> list[int]:
    """Samples that a rank has of the number-th micro-batch of an epoch; where one is bad, another stands in for it."""
    return [order.sample(epoch, batching.first(number) + place) for place in batching.places(number, rank)]


def sample_names(split: Split, batching: Batching) -> Callable[[int, int, int], list[str]]:
    """Keys of the samples that (rank, epoch, number of the micro-batch) has, for messages; safe in any thread."""

    def names(rank: int, epoch: int, number: int) -> list[str]:
        order = Order(split.shard_counts, seed=batching.seed, window=batching.window)
        return [split.key(sample) for sample in planned(order, batching, epoch, number, rank)]

    return names


class TrainShares:
    """A rank's share of every micro-batch of every epoch."""

    def __init__(self, images: Images, augment: Augmentation, batching: Batching):
        self.images, self.augment, self.batching = images, augment, batching
        self.order = Order(images.split.shard_counts, seed=batching.seed, window=batching.window)

    def load(self, epoch: int, number: int) -> Item:
        b, augment = self.batching, self.augment.at(epoch)
        places = b.places(number, b.rank)
        partners = [partner(place, b.global_batch_size) if augment.mixing else place for place in places]
        lacking = sorted({*partners} - {*places})  # at most one beyond either end: other ranks hold them
        ordered = [self.order.sample(epoch, b.first(number) + place) for place in (*places, *lacking)]
        keys = [mixed(b.seed, epoch, sample, _AUGMENT) for sample in ordered]
        faults: list[Fault] = []
        pixels, samples = [], []
        for row, (sample, key) in enumerate(zip(ordered, keys, strict=True)):
            image, loaded, met = self.images.load_or_substitute(sample, partial(augment.crop, key=key), b.seed, epoch)
            pixels.append(image)
            samples.append(loaded)
            faults += met if row < len(places) else []  # each is reported by the rank that trains on it
        labels = [int(self.images.split.label_S[s]) for s in samples]
        variations = [augment.variation(key) for key in keys]
        own, size = len(places), augment.size
        if augment.mixing is None:
            return collate(pixels, labels, keys, variations, samples, size), faults
        row_of = {place: row for row, place in enumerate((*places, *lacking))}
        mates = [(row_of[place] - row, labels[row_of[place]]) for row, place in enumerate(partners)]
        mixes = [augment.mixing.draw(key, size) for key in keys[:own]]
        batch = collate(pixels, labels[:own], keys[:own], variations, samples[:own], size, partners=mates, mixes=mixes)
        return batch, faults


class Evaluation(Protocol):
    """Items of an evaluation by their numbers; blocks.py has another kind."""

    images: Images

    def __len__(self) -> int: ...

    def load(self, number: int) -> Item: ...


class EvaluationShares:
    """A rank's share of every evaluation batch: each image once, a bad one and the rest of the last batch padding."""

    def __init__(self, images: Images, crop: CentreCrop, batching: Batching):
        self.images, self.crop, self.batching = images, crop, batching
        self.per_rank = -(-batching.global_batch_size // batching.world)
        if batching.micro_batch_size:
            self.per_rank = min(self.per_rank, batching.micro_batch_size)

    def __len__(self) -> int:
        return math.ceil(len(self.images.split) / (self.per_rank * self.batching.world))

    def load(self, number: int) -> Item:
        whole = self.per_rank * self.batching.world
        first = number * whole
        mine = share(min(whole, len(self.images.split) - first), self.batching.world, self.batching.rank)
        loaded = {first + place: self.images.load(first + place, self.crop.crop) for place in mine}
        faults = [image for image in loaded.values() if isinstance(image, Fault)]
        pixels = {sample: image for sample, image in loaded.items() if not isinstance(image, Fault)}
        labels = [int(self.images.split.label_S[s]) for s in pixels]
        keys, variations = [0] * len(pixels), [UNCHANGED] * len(pixels)
        size, samples = self.crop.size, list(pixels)
        return collate(list(pixels.values()), labels, keys, variations, samples, size, self.per_rank), faults


def open_evaluation(source: Source, num_classes: int, crop: CentreCrop, batching: Batching) -> EvaluationShares:
    """The validation images of a data set. Raises DataError."""
    return EvaluationShares(open_images(source, "val", num_classes), crop, batching)


class Items(Dataset[Item]):
    """All that a worker can be asked for."""

    def __init__(self, train: TrainShares, evaluation: Callable[[], Evaluation]):
        self.train, self._evaluation = train, evaluation
        self._opened: Evaluation | None = None

    @property
    def evaluation(self) -> Evaluation:
        """Opened when first asked for: training needs no validation images until then."""
        if self._opened is None:
            self._opened = self._evaluation()
        return self._opened

    def __getitem__(self, place: Place) -> Item:
        if place.epoch is None:
            return self.evaluation.load(place.number)
        return self.train.load(place.epoch, place.number)


class Places(Sequence[Place]):
    """What is asked for next; the workers' loader keeps this one list over all its iterations."""

    def __init__(self) -> None:
        self.epoch: int | None = 0
        self.numbers: Sequence[int] = range(0)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        return Place(self.epoch, self.numbers[index])


class Workers:
    """Processes that load items, started at the first use and kept; 0 = the process itself."""

    def __init__(self, items: Items, count: int):
        self.items, self.count = items, count
        self._places = Places()
        self._loader = self._new(self._places)
        self._running: object | None = None
        # multiprocessing would end them by one SIGTERM at exit, which they take for a signal to the whole job. atexit
        # comes before that, and before torch forgets how to end them, but not in a process of multiprocessing's own.
        atexit.register(_end, weakref.ref(self))
        Finalize(None, _end, (weakref.ref(self),), exitpriority=1)

    def load(self, epoch: int | None, numbers: Sequence[int]) -> Iterator[Item]:
        """Items in the order of their numbers."""
        if self._running is not None:  # one iteration inside another: it gets processes of its own
            places = Places()
            places.epoch, places.numbers = epoch, numbers
            yield from _in_one_line(self._new(places, keep=False))
            return
        self._places.epoch, self._places.numbers = epoch, numbers
        token = self._running = object()
        try:
            for place, item in zip(numbers, _in_one_line(self._loader), strict=True):
                if place == numbers[-1]:
                    self._running = None  # who knows how many there are does not come back to hear of the end
                yield item
        finally:
            if self._running is token:
                self._running = None

    def _new(self, places: Places, keep: bool = True) -> DataLoader[Item]:
        options: dict[str, Any] = {}
        if self.count:
            # Imported once, before the workers fork from this server: they start in milliseconds and share its pages.
            multiprocessing.set_forkserver_preload(["pipeline.data.fork_server"])
            options = {
                "prefetch_factor": PREFETCHED, "persistent_workers": keep, "multiprocessing_context": "forkserver",
                "worker_init_fn": _serve,
            }  # fmt: skip
        return DataLoader(self.items, batch_size=None, sampler=places, num_workers=self.count, **options)


class TrainLoader:
    """Micro-batches of the epochs, one epoch an iteration; whole global batches only, the rest of an epoch is left out.

    Its state names the next sample. It advances when a batch is handed out, so it is right wherever
    every batch handed out has been trained on: at the end of an optimizer step. faults: of the batches
    handed out, for whoever takes them away.
    """

    def __init__(self, workers: Workers, *, digest: str = "", read_ahead: ReadAhead | None = None):
        self.workers, self.shares, self.digest, self.read_ahead = workers, workers.items.train, digest, read_ahead
        self.batching, self.images = self.shares.batching, self.shares.images
        self.faults: list[Fault] = []
        self.epoch, self.number = 0, 0  # number: of the next micro-batch of the epoch
        self.steps = len(self.images.split) // self.batching.global_batch_size
        self.dropped = len(self.images.split) - self.steps * self.batching.global_batch_size
        if not self.steps:
            raise DataError(
                f"data.global_batch_size = {self.batching.global_batch_size} exceeds the {len(self.images.split)} "
                "training images, so that an epoch has no step; lower it"
            )

    def __len__(self) -> int:
        return self.steps * self.batching.pieces

    def __iter__(self) -> Iterator[Batch]:
        if self.read_ahead is not None:
            self.read_ahead.begin(self.epoch, self._sample)
        for batch, faults in self.workers.load(self.epoch, range(self.number, len(self))):
            self.faults += faults
            if self.read_ahead is not None:
                self.read_ahead.at(self.epoch, self._sample)
            self.number += 1
            if self.number == len(self):  # (epoch, end) is (epoch + 1, 0)
                self.epoch, self.number = self.epoch + 1, 0
            yield batch

    def population_batches(self, images: int) -> Iterator[Batch]:
        """Micro-batches for population statistics, at least `images` images over all ranks; moves nothing.

        They begin an order of their own, which depends on the seed alone: whoever estimates from the
        same weights, in training or later, gets the same statistics.
        """
        per_batch = self.batching.global_batch_size / self.batching.pieces
        count = min(len(self), -int(-images // per_batch))
        for batch, _ in self.workers.load(POPULATION_EPOCH, range(count)):
            yield batch

    @property
    def _sample(self) -> int:
        """Place in the epoch of the next global batch."""
        return self.number // self.batching.pieces * self.batching.global_batch_size

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch, "sample": self._sample, "global_batch_size": self.batching.global_batch_size,
            "digest": self.digest,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["global_batch_size"] != self.batching.global_batch_size:
            raise DataError(
                f"data.global_batch_size = {self.batching.global_batch_size}, but the checkpoint was written with "
                f"{state['global_batch_size']}; it is part of what a run is: keep it, or start a new run"
            )
        if state.get("digest", self.digest) != self.digest:
            raise DataError(
                f"the checkpoint was written on another data set than {self.images.split.root} holds (digest "
                f"{state['digest'][:16]}, here {self.digest[:16]}); bring the first one back, or start a new run"
            )
        self.epoch = state["epoch"]
        self.number = state["sample"] // self.batching.global_batch_size * self.batching.pieces


class EvaluationLoader:
    """Batches of the validation images, each image once. faults: of the batches handed out."""

    def __init__(self, workers: Workers):
        self.workers = workers
        self.faults: list[Fault] = []

    def __len__(self) -> int:
        return len(self.workers.items.evaluation)

    def __iter__(self) -> Iterator[Batch]:
        for batch, faults in self.workers.load(None, range(len(self))):
            self.faults += faults
            yield batch


def _in_one_line(items: Iterable[Item]) -> Iterator[Item]:
    """The same items. A DataError of a worker comes without the traceback in which torch has wrapped its message."""
    try:
        yield from items
    except DataError as error:
        first, found, trace = str(error).partition("Original Traceback")
        if not found:
            raise
        raise DataError(trace.rstrip().rpartition("\n")[2].partition(": ")[2] or first) from None


def _end(workers: weakref.ref[Workers]) -> None:
    """Tell the processes that there is no more to do, and wait for them."""
    alive = workers()
    iterator = alive._loader._iterator if alive is not None else None
    if iterator is not None:
        iterator._shutdown_workers()  # type: ignore[attr-defined]


def _serve(worker: int) -> None:
    """A worker goes on through signals to the whole job, until the process it serves has saved and ends it, or is gone.

    The process may end it by SIGTERM, too: the second one counts.
    """
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
