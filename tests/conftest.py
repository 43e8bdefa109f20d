"""Images that tests make themselves: nothing outside the repository is needed."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as in a run, for bits that repeat on a GPU
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: kernels run on the CPU, step by step

from pipeline.data.writer import write_shards


def noise_image(seed: int, width: int, height: int, kind: str = "PNG", mode: str = "RGB") -> bytes:
    """A picture that is different for each seed: smooth noise, so that JPEG keeps it."""
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 6, 4 if mode == "CMYK" else 3), dtype=np.uint8)
    image = Image.fromarray(coarse, mode="CMYK" if mode == "CMYK" else None).resize((width, height))
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, kind)
    return buffer.getvalue()


def make_folders(root: Path, *, classes: int = 5, train: int = 26, val: int = 7) -> Path:
    """Class folders with train/ and val/: PNG and JPEG of several sizes."""
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                seed = (label * 1000 + number) * 2 + (split == "val")
                kind, suffix = (("PNG", "png"), ("JPEG", "jpg"))[number % 2]
                (folder / f"{number:03d}.{suffix}").write_bytes(noise_image(seed, 20 + number % 3, 18, kind))
    return root


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def shards(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """130 training and 35 validation images in 5 classes, in shards of 30."""
    root = tmp_path_factory.mktemp("packed") / "shards"
    write_shards(str(folders), root, samples_per_shard=30)
    return root
