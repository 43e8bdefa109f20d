"""What the terminal says of a run: before its first step, and after its last."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pipeline.config import Config, statistics_group
from pipeline.data.order import SORTED, WELL_MIXED, Order, shard_mixing, shuffle_quality
from pipeline.evaluation.metrics import Scores
from pipeline.run.assembly import Assembly, micro_batch_images
from pipeline.training.checkpoint_io import AVERAGED
from pipeline.training.soup import SOUP

RUNNING = "running averages"


def announce(run: Assembly, start: Path | None, console: Console) -> None:
    config, loader = run.config, run.data.train_loader
    pieces = run.data.batching.pieces
    parameters = sum(p.numel() for p in run.classifier.model.parameters())
    console.print(
        f"{config.run.id}: {config.model.name}, {parameters:,} parameters, {run.world.size} "
        f"{'process' if run.world.size == 1 else 'processes'}; {run.steps:,} steps of {config.data.global_batch_size} "
        f"images, rate {run.classifier.schedule.scaled_rate:g}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if misfit := run.classifier.schedule.misfit(run.steps):
        console.print(f"WARNING: {misfit}", highlight=False, soft_wrap=True)
    if loader.dropped:
        console.print(f"each epoch leaves out {loader.dropped} of {len(loader.images.split):,} images (another "
                      "selection each time), so that every step is a whole global batch",
                      highlight=False, soft_wrap=True)  # fmt: skip
    order, label_S = loader.shares.order, loader.images.split.label_S
    if order.window < len(order.counts):
        console.print(_mixing(order, label_S, config.data.global_batch_size), highlight=False, soft_wrap=True)
    micro = micro_batch_images(config, run.world.size)
    if config.norm.group_images:
        group = int(statistics_group(config, run.world.size)) or run.world.size
        console.print(f"batch statistics are those of {-(-micro * group // run.world.size)} images, on {group} of "
                      f"{run.world.size} {'process' if run.world.size == 1 else 'processes'}; a step has {pieces} "
                      f"micro-batch{'' if pieces == 1 else 'es'}", highlight=False, soft_wrap=True)  # fmt: skip
    elif pieces > 1:
        console.print(f"gradients accumulate over {pieces} micro-batches a step; batch statistics are those of a "
                      f"micro-batch, {micro} images over all ranks", highlight=False, soft_wrap=True)  # fmt: skip
    if start:
        console.print(f"going on from {start}", highlight=False, soft_wrap=True)
    for line in run.data.dataset.streaming(config.data.window):
        console.print(line, highlight=False, soft_wrap=True)
    if loader.read_ahead is not None:
        loader.read_ahead.say = loader.read_ahead.warn = partial(console.print, highlight=False, soft_wrap=True)


def _mixing(order: Order, label_S: NDArray[np.int32], batch_size: int) -> str:
    """What shuffling within windows costs, in a number."""
    quality = shuffle_quality(order, label_S, batch_size)
    said = (f"shuffle quality {quality:.2f} (label entropy of batches against a uniform draw), in windows of "
            f"{order.window} of {len(order.counts)} shards")  # fmt: skip
    if quality >= WELL_MIXED:
        return said
    if shard_mixing(order.counts, label_S) < SORTED:
        return f"{said}; WARNING: the shards are sorted by class: set data.window=0, or write them again"
    return f"{said}; WARNING: batches are less mixed than random ones: raise data.window, or set it to 0"


def summarize(run: Assembly, steps: int, elapsed: float, console: Console) -> None:
    """elapsed: seconds since training began in this start."""
    config, scores = run.config, run.classifier.scores
    facts = {"steps": f"{steps:,}", "time": f"{elapsed / 60:.1f} min"}
    if scores is not None:
        facts |= {"validation top-1": f"{scores.top1:.2%}", "validation top-5": f"{scores.top5:.2%}",
                  "validation loss": f"{scores.loss:.4f}", "images": f"{scores.images:,}",
                  "statistics": statistics_used(config), **beside(run.classifier.scores_beside)}  # fmt: skip
    facts["run directory"] = str(config.directory)
    console.print(table(config.run.id, facts))


def statistics_used(config: Config, checkpoint: Mapping[str, Any] | None = None) -> str:
    """checkpoint: whose weights they go with; None = a run's own, as it trains them."""
    if config.norm.frozen:
        return "frozen, as they were loaded"
    if images := config.norm.precise_images:
        return f"population, {images:,} training images at most"
    if checkpoint is not None and SOUP in checkpoint:
        return "population, as estimated when it was averaged"
    if checkpoint is not None and AVERAGED in checkpoint:
        return "population, as estimated on the average by its run's last validation"
    return RUNNING


def beside(scores: Scores | None, name: str = RUNNING) -> dict[str, str]:
    """A row of scores with other statistics, where there are any."""
    if scores is None:
        return {}
    return {f"with {name}": f"top-1 {scores.top1:.2%}  top-5 {scores.top5:.2%}  loss {scores.loss:.4f}"}


def table(title: str, facts: dict[str, Any]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table
