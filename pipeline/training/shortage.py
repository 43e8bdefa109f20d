"""What to say when memory ran out: what was asked for, and what to lower."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ ?\w+)")


@dataclass(frozen=True, slots=True)
class Appetite:
    """What decides how much memory a rank takes. images: of a micro-batch on a rank."""

    images: int
    image_size: int
    width: float
    precision: str
    workers: int


def shortage(error: BaseException, appetite: Appetite) -> str:
    """One line for an error that comes of too little memory; "" for another."""
    text = str(error)
    cuda = isinstance(error, torch.OutOfMemoryError) or "CUDA out of memory" in text
    if cuda or isinstance(error, MemoryError) or ("DefaultCPUAllocator" in text and "memory" in text):
        asked = _ASKED.search(text)
        return (f"out of memory{' on the GPU' if cuda else ''}"
                f"{f', asked for {asked[1]} more' if asked else ''}: {_remedy(appetite)}")  # fmt: skip
    if "DataLoader worker" in text and ("killed by signal" in text or "exited unexpectedly" in text):
        said = text.strip().splitlines()[0]
        if "Bus error" in text or "shared memory" in text:
            return (f"{said}: /dev/shm is full; enlarge it (docker run --ipc=host or --shm-size=8g), or lower "
                    f"cluster.workers (now {appetite.workers})")  # fmt: skip
        return (f"{said}: if nobody did that, the memory ran out; lower cluster.workers (now {appetite.workers}), "
                "each holds batches of its own")  # fmt: skip
    return ""


def _remedy(appetite: Appetite) -> str:
    half = appetite.images // 2
    ways = []
    if half:
        ways.append(f"lower data.micro_batch_size (now {appetite.images} images on a rank) to {half}: gradients "
                    "add up to the same global batch, batch statistics then are those of the micro-batch")  # fmt: skip
    smaller = [f"data.image_size (now {appetite.image_size})", f"model.width (now {appetite.width:g})"]
    if appetite.precision != "bf16":
        smaller.append(f"trainer.precision=bf16 (now {appetite.precision})")
    return "; ".join([*ways, f"or, in a new run, {', '.join(smaller)}"])
