"""The workspace of a project: sections and panels over `step`, by the names of docs/metrics.md. Plain data.

Each panel shows what its title says of every run on the page, also over restarts: `step` counts over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.callbacks.metrics import METRICS, Metric, wandb_name

NAME = "pipeline"  # of the workspace, as W&B's page shows it
AXIS = "step"


@dataclass(frozen=True, slots=True)
class Panel:
    """Lines over `step`. metrics: as W&B has them. pattern: in place of them, a regular expression of names."""

    title: str
    metrics: Sequence[str] = ()
    pattern: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """Panels under one heading. is_open: when the page is opened."""

    name: str
    panels: Sequence[Panel]
    is_open: bool = True


@dataclass(frozen=True, slots=True)
class Workspace:
    """columns: beside the name of each run, as config:KEY or summary:METRIC."""

    name: str
    axis: str
    columns: Sequence[str]
    sections: Sequence[Section]


ACCURACY = Section("Accuracy", (
    Panel("Validation top-1", ("val/top1",)),
    Panel("Validation loss, nats", ("val/loss",)),
    Panel("Training loss, nats", ("train/loss",)),
    Panel("Validation top-5", ("val/top5",)),
    Panel("Training top-1", ("train/top1",)),
    Panel("Learning rate", ("train/rate",)),
))  # fmt: skip
THROUGHPUT = Section("Throughput", (
    Panel("Images a second, all ranks", ("train/images_per_s",)),
    Panel("Images a second, mean rank", ("train/images_per_s_rank",)),
    Panel("Model FLOP utilization", ("train/mfu",)),
    Panel("Shares of time: data, statistics, gradients, checkpoints",
          ("train/data_wait", "train/statistics_wait", "train/gradient_wait", "train/checkpoint_wait")),
    Panel("Images a second, mean node", ("train/images_per_s_node",)),
    Panel("Rank that holds up the others", ("train/slowest_rank",)),
    Panel("Slowest rank's own time a step / median of the others'", ("train/slowest_over_median",)),
    Panel("Seconds of training a row", ("train/span",)),
))  # fmt: skip
DATA = Section("Data", (
    Panel("Share of time waiting for data", ("train/data_wait",)),
    Panel("Images trained on", ("samples",)),
    Panel("Epochs", ("epoch",)),
    Panel("Rank that waits longest for data", ("train/slowest_data_rank",)),
))  # fmt: skip
STATISTICS = Section("Statistics", (
    Panel("Share of time in statistics collectives", ("train/statistics_wait",)),
    Panel("Share of time in gradient collectives", ("train/gradient_wait",)),
    Panel("Inputs of nonlinearities, median (tracking.percentiles_every_steps)", pattern=r"^percentiles/.+/p50$"),
    Panel("Inputs of nonlinearities, 15th and 85th percentile", pattern=r"^percentiles/.+/p(15|85)$"),
    Panel("Kurtosis of gradients (tracking.gradients_every_steps)", pattern=r"^gradients/.+/kurtosis$"),
))  # fmt: skip
NODES = Section("System", (
    Panel("Memory of rank 0, GB", ("train/memory_gb",)),
    Panel("CPU of each node, share of all cores", pattern=r"^system/cpu/node-\d+$"),
    Panel("Memory used on each node, GB", pattern=r"^system/memory_used_gb/node-\d+$"),
    Panel("Use of each GPU, share of time", pattern=r"^system/gpu\d+_use/node-\d+$"),
    Panel("Memory used on each GPU, GB", pattern=r"^system/gpu\d+_memory_used_gb/node-\d+$"),
    Panel("Watts of each GPU", pattern=r"^system/gpu\d+_watts/node-\d+$"),
    Panel("Degrees of each GPU, Celsius", pattern=r"^system/gpu\d+_celsius/node-\d+$"),
    Panel("Network of each node, in and out, MB/s", pattern=r"^system/network_(in|out)_mb/node-\d+$"),
    Panel("Disks of each node, read and written, MB/s", pattern=r"^system/disk_(read|write)_mb/node-\d+$"),
    Panel("Free disk of each node, GB", pattern=r"^system/disk_free_gb/node-\d+$"),
    Panel("Load of each node", pattern=r"^system/load/node-\d+$"),
))  # fmt: skip
RESTARTS = Section("Restarts", (
    Panel("Goodput so far", ("train/goodput",)),
    Panel("Ranks of this start", ("train/ranks",)),
    Panel("Nodes of this start", ("train/nodes",)),
    Panel("Share of time in checkpoints", ("train/checkpoint_wait",)),
    Panel("Seconds of a validation", ("val/span",)),
))  # fmt: skip

WORKSPACE = Workspace(
    NAME, AXIS,
    ("config:run.recipe", "config:run.data", "summary:val/top1", "summary:train/goodput", "summary:train/ranks"),
    (ACCURACY, THROUGHPUT, DATA, STATISTICS, NODES, RESTARTS),
)  # fmt: skip

# What a comparison of recipes shows of their runs.
COMPARED = (
    Panel("Validation top-1", ("val/top1",)),
    Panel("Validation loss, nats", ("val/loss",)),
    Panel("Training loss, nats", ("train/loss",)),
    Panel("Learning rate", ("train/rate",)),
    Panel("Images a second, all ranks", ("train/images_per_s",)),
    Panel("Goodput so far", ("train/goodput",)),
)


def documented() -> set[str]:
    """Every name of metrics.py as W&B may have it."""
    return {wandb_name(metric, split) for metric in METRICS for split in _splits(metric)}


def _splits(metric: Metric) -> list[str]:
    return metric.rows.split(", ")
