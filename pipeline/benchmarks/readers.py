"""The whole stream: tars on disk -> batches of uint8 crops (flipped where that is free) with their labels.

Ours flips, distorts and normalizes on the device; the peers stop where ours does, and one row of ours goes on.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.benchmarks.crops import AREA, ASPECT, FLOOR, CropTask, dali_crop, entropy, is_common
from pipeline.benchmarks.rounds import Contender, Work
from pipeline.data.augment import Augmentation, CentreCrop, Preparation
from pipeline.data.dataset import Dataset
from pipeline.data.images import Images, open_images
from pipeline.data.loader import Batching, Items, TrainLoader, TrainShares, Workers, open_evaluation

SHUFFLE = 1000  # samples in the peers' buffers
_IMAGE = "jpg;jpeg;png;webp"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class StreamTask:
    """A split of shards on this machine's disk; images: of a round, in whole batches."""

    dataset: Dataset
    split: str
    images: int
    size: int
    batch: int

    @property
    def shards(self) -> list[str]:
        return [str(self.dataset.path(entry).resolve()) for entry in self.dataset.manifest.splits[self.split]]

    def opened(self) -> Images:
        return open_images(self.dataset, self.split, 0)


def _work(batches_of: Callable[[StreamTask], Iterator[int]], task: StreamTask) -> Work:
    """Rounds of one endless stream; batches_of gives the sizes of its batches."""
    sizes = batches_of(task)

    def work(number: int) -> int:
        done = 0
        while done < task.images:
            done += next(sizes)
        return done

    return work


def ours_batches(task: StreamTask) -> Iterator[Any]:
    crop = CentreCrop(size=task.size)
    batching = Batching(global_batch_size=task.batch)
    shares = TrainShares(task.opened(), Augmentation(size=task.size, area_min=AREA[0]), batching)
    evaluation = partial(open_evaluation, task.dataset, 0, crop, batching)
    loader = TrainLoader(Workers(Items(shares, evaluation), 0))
    while True:
        yield from loader


def ours(task: StreamTask) -> Iterator[int]:
    for batch in ours_batches(task):
        yield len(batch.label_N)


def ours_prepared(task: StreamTask) -> Iterator[int]:
    prepare = Preparation(_MEAN, _STD)
    for batch in ours_batches(task):
        yield len(prepare(batch.image_NCHW, batch.variation_NV, torch.float32))


def _augmented(size: int) -> Any:
    from torchvision.transforms import v2

    return v2.Compose([v2.RandomResizedCrop(size, scale=AREA, ratio=ASPECT, antialias=True), v2.RandomHorizontalFlip()])


def _sizes(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[int]:
    for image_NCHW, label_N in batches:
        if image_NCHW.dtype != torch.uint8 or len(image_NCHW) != len(label_N):
            raise TypeError(f"a batch of {image_NCHW.dtype} with {len(label_N)} labels")
        yield len(image_NCHW)


def webdataset_pillow(task: StreamTask) -> Iterator[int]:
    import webdataset
    from torchvision.transforms import v2

    augment = v2.Compose([_augmented(task.size), v2.PILToTensor()])
    stream = webdataset.WebDataset(task.shards, shardshuffle=len(task.shards), seed=0).shuffle(SHUFFLE).decode("pil")
    batches = stream.to_tuple(_IMAGE, "cls").map_tuple(augment, int).batched(task.batch).repeat()
    yield from _sizes(batches)


def webdataset_torchvision(task: StreamTask) -> Iterator[int]:
    import webdataset
    from torchvision.io import ImageReadMode, decode_image

    augment = _augmented(task.size)

    def pixels(payload: bytes) -> Any:
        return augment(decode_image(torch.frombuffer(bytearray(payload), dtype=torch.uint8), ImageReadMode.RGB))

    stream = webdataset.WebDataset(task.shards, shardshuffle=len(task.shards), seed=0).shuffle(SHUFFLE)
    batches = stream.to_tuple(_IMAGE, "cls").map_tuple(pixels, int).batched(task.batch).repeat()
    yield from _sizes(batches)


def timm(task: StreamTask) -> Iterator[int]:
    from timm.data import create_dataset, create_transform
    from timm.data.loader import fast_collate

    with tempfile.TemporaryDirectory() as folder:  # its reader wants the shards beside a description of its own
        root = _described(Path(folder), task.shards, task.opened().split.shard_counts)
        dataset = create_dataset(
            "wds/", root=str(root), split="train", is_training=True, batch_size=task.batch, input_key=_IMAGE
        )
        # no colour jitter, which the others leave to the device; use_prefetcher: uint8, to be normalized there
        dataset.transform = create_transform(task.size, is_training=True, color_jitter=None, use_prefetcher=True)
        loader = torch.utils.data.DataLoader(dataset, batch_size=task.batch, collate_fn=fast_collate)
        while True:
            yield from _sizes(loader)


def _described(root: Path, shards: Sequence[str], counts: Sequence[int]) -> Path:
    names = [f"{number:06d}.tar" for number in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        (root / name).symlink_to(shard)
    split = {"name": "train", "num_samples": sum(counts), "filenames": names, "shard_lengths": list(counts)}
    (root / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    return root


def dali(task: StreamTask) -> Iterator[int]:
    from nvidia.dali import fn, pipeline_def

    indexes = [
        Path(shard).with_suffix(".idx") for shard in task.shards
    ]  # packed shards have them; else DALI makes its own
    known = {"index_paths": [str(index) for index in indexes]} if all(index.exists() for index in indexes) else {}

    @pipeline_def(batch_size=task.batch, num_threads=1, device_id=None, seed=0, prefetch_queue_depth=1)
    def graph():  # type: ignore[no-untyped-def]
        encoded, label = fn.readers.webdataset(
            paths=task.shards, ext=[_IMAGE, "cls"], random_shuffle=True, initial_fill=SHUFFLE, **known
        )
        return fn.flip(dali_crop(encoded, task.size), horizontal=fn.random.coin_flip()), label

    pipe = graph()
    pipe.build()
    while True:
        crops, labels = pipe.run()
        image_NCHW = torch.from_numpy(crops.as_array()).permute(0, 3, 1, 2)  # channels last in memory, as ours
        label_N = torch.tensor([int(bytes(labels.at(i))) for i in range(len(labels))])
        yield from _sizes([(image_NCHW, label_N)])


def _entropy(task: StreamTask) -> Work:
    images = task.opened()
    samples = range(min(task.images, len(images.split)))
    payloads = [payload for payload in map(images.stream.read, samples) if is_common(payload)]
    return entropy(CropTask(payloads, task.size, task.batch))


def _row(
    name: str, what: str, batches_of: Callable[[StreamTask], Iterator[int]], peer: bool = True
) -> Contender[StreamTask]:
    return Contender(name, what, partial(_work, batches_of), peer)


CONTENDERS: list[Contender[StreamTask]] = [
    _row("ours", "TrainLoader, checks every image's hash", ours, False),
    _row("ours-float", "the same, flipped, distorted and normalized here", ours_prepared, False),
    _row("webdataset-pillow", "webdataset, decode('pil'), v2 crop and flip", webdataset_pillow),
    _row("webdataset-torchvision", "webdataset, torchvision.io, v2 crop and flip", webdataset_torchvision),
    _row("timm", "timm's wds reader, its training crop and flip", timm),
    _row("dali", "DALI CPU reader, image_random_crop, resize, flip", dali),
    Contender(FLOOR.name, FLOOR.what, _entropy, peer=False),
]
