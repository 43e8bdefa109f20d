"""The data module that Lightning drives: loaders, and a position that travels with every checkpoint."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning

from pipeline.data.augment import Augmentation, CentreCrop
from pipeline.data.dataset import Dataset
from pipeline.data.images import open_images
from pipeline.data.loader import (
    Batching,
    EvaluationLoader,
    Items,
    TrainLoader,
    TrainShares,
    Workers,
    open_evaluation,
    sample_names,
)
from pipeline.data.read_ahead import ReadAhead
from pipeline.data.split import Split


class ImageData(lightning.LightningDataModule):
    """Training and validation loaders of one data set."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        num_classes: int,
        augment: Augmentation,
        crop: CentreCrop,
        batching: Batching,
    ):
        super().__init__()
        self.dataset, self.crop, self.batching = dataset, crop, batching
        train = open_images(dataset, "train", num_classes, batching.window)
        shares = TrainShares(train, augment, batching)
        evaluation = partial(open_evaluation, dataset, num_classes, crop, batching)
        workers = Workers(Items(shares, evaluation), batching.workers)
        ahead = None
        if dataset.cache is not None:
            ahead = ReadAhead(dataset.cache, train.split, shares.order, staged=dataset.is_staged)
        self.train_loader = TrainLoader(workers, digest=dataset.manifest.digest, read_ahead=ahead)
        self.val_loader = EvaluationLoader(workers)
        self.names = sample_names(train.split, batching)

    def __len__(self) -> int:
        """Micro-batches of a training epoch."""
        return len(self.train_loader)

    def state_dict(self) -> dict[str, Any]:
        return self.train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning hands a loader its state only where an epoch was left unfinished: a checkpoint of an epoch's end
        # would begin the first epoch's order again. It hands it to the data module always.
        self.train_loader.load_state_dict(state_dict)

    @property
    def root(self) -> str:
        """Where the images lie."""
        return self.dataset.location.root

    @property
    def val_images(self) -> Split:
        return self.train_loader.workers.items.evaluation.images.split

    def keys(self, samples: list[int]) -> list[str]:
        """Names of training samples, for ledgers and error messages."""
        return [self.train_loader.images.split.key(s) for s in samples]

    def train_dataloader(self) -> TrainLoader:
        return self.train_loader

    def teardown(self, stage: str) -> None:
        if self.train_loader.read_ahead is not None:
            self.train_loader.read_ahead.close()

    def val_dataloader(self) -> EvaluationLoader:
        return self.val_loader
