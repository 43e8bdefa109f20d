"""Every metric of a run by name: the columns of metrics.csv, and what Weights & Biases gets of them.

docs/metrics.md is the same list for readers. A name, once here, stays: dashboards and scripts rely on it.
"""

from __future__ import annotations

from dataclasses import dataclass

BOTH, TRAIN, VAL = "train, val", "train", "val"


@dataclass(frozen=True, slots=True)
class Metric:
    """unit: "" for a count or a number without one. rows: those that have it."""

    name: str
    unit: str
    rows: str
    meaning: str


# What a row belongs to. W&B's charts are over `step`, whatever its own _step.
AXES = (
    Metric("step", "optimizer steps", BOTH, "taken so far, over all starts"),
    Metric("epoch", "epochs", BOTH, "with its fraction: step x global batch / training images"),
    Metric("samples", "images", BOTH, "that the steps so far took, over all starts; a later epoch's count again"),
)
SCORES = (
    Metric("loss", "nats", BOTH, "mean over the row's images; of training with label smoothing and auxiliary head"),
    Metric("top1", "fraction", BOTH, "of the row's images"),
    Metric("top5", "fraction", BOTH, "of the row's images"),
)
RUNNING = (  # beside the scores with population statistics
    Metric("running_loss", "nats", VAL, "loss of the same validation with running averages; with norm.compare alone"),
    Metric("running_top1", "fraction", VAL, "of the same images, with running averages; with norm.compare alone"),
    Metric("running_top5", "fraction", VAL, "of the same images, with running averages; with norm.compare alone"),
)
TRAINED = (  # beside the scores of averaged weights
    Metric("trained_loss", "nats", VAL, "where weights are averaged, and loss is theirs: of the trained ones"),
    Metric("trained_top1", "fraction", VAL, "where weights are averaged, and top1 is theirs: of the trained ones"),
    Metric("trained_top5", "fraction", VAL, "where weights are averaged, and top5 is theirs: of the trained ones"),
)
SPEED = (
    Metric("rate", "", TRAIN, "learning rate of the last step"),
    Metric("images_per_s", "images/s", TRAIN, "over all ranks: the row's images / span"),
    Metric("data_wait", "fraction of span", TRAIN, "waiting for a batch; mean over ranks"),
    Metric("statistics_wait", "fraction of span", TRAIN,
           "standing in collectives of batch statistics, for slower ranks too; mean over ranks"),
    Metric("gradient_wait", "fraction of span", TRAIN,
           "after the last gradient of a rank's own, until those of all are there; mean over ranks"),
    Metric("checkpoint_wait", "fraction of span", TRAIN,
           "looking at the weights and copying them; the thread that writes is beside the training"),
    Metric("span", "s", BOTH, "of a training row: in training since the last one, validations left out, in earlier "
           "starts too. Of a validation: itself, and the estimate of statistics before it"),
    Metric("mfu", "fraction", TRAIN, "operations of convolutions and matrix products / the most that devices can do; "
           "none on a CPU and on devices without a known peak"),
    Metric("memory_gb", "1e9 bytes", BOTH, "of rank 0, the most so far: allocated on the GPU, or resident on a CPU"),
    Metric("goodput", "fraction", BOTH, "seconds in steps that count / seconds since the run first began, whatever "
           "lies between its starts included"),
    Metric("ranks", "", BOTH, "of this start"),
    Metric("nodes", "", BOTH, "of this start"),
    Metric("slowest_rank", "", TRAIN, "that takes longer over its own part of a step than the others, again and again; "
           "none where none does"),
    Metric("slowest_over_median", "", TRAIN, "the most that a rank's own time a step is of the median of the others', "
           "in the middle one of the last 20 rows; none for a rank that is alone"),
    Metric("slowest_data_rank", "", TRAIN, "that waits longer for data than the others, again and again; none where "
           "none does"),
)  # fmt: skip
ONLY_IN_CSV = (
    Metric("split", "", BOTH, "train or val"),
    Metric("images", "images", BOTH, "behind the row's scores: trained on since the last row, or validated"),
    Metric("seconds", "s", BOTH, "since training began in this start"),
    Metric("at", "s", BOTH, "since 1970-01-01 UTC, when the row was written"),
)
ONLY_IN_WANDB = (
    Metric("images_per_s_node", "images/s", TRAIN, "images_per_s / nodes: what a node does in the mean"),
    Metric("images_per_s_rank", "images/s", TRAIN, "images_per_s / ranks: what a rank does in the mean"),
)
# Of every node: in system/node-<n>.csv, and in W&B as system/<name>/node-<n> beside the first row behind a sample.
SYSTEM = (
    Metric("cpu", "fraction", TRAIN, "of the time of all cores, since the sample before"),
    Metric("load", "", TRAIN, "processes that run or wait to, mean of a minute"),
    Metric("memory_used_gb", "1e9 bytes", TRAIN, "on the node, by whomever"),
    Metric("disk_read_mb", "1e6 bytes/s", TRAIN, "from all disks of the node"),
    Metric("disk_write_mb", "1e6 bytes/s", TRAIN, "to all disks of the node"),
    Metric("disk_free_gb", "1e9 bytes", TRAIN, "free where the run's directory is"),
    Metric("network_in_mb", "1e6 bytes/s", TRAIN, "over all network cards; RDMA is not counted"),
    Metric("network_out_mb", "1e6 bytes/s", TRAIN, "over all network cards; RDMA is not counted"),
)
OF_EACH_GPU = (  # of GPU <g> of a node, as NVIDIA's driver numbers them: gpu<g>_<name>
    Metric("use", "fraction", TRAIN, "of time in which a kernel ran"),
    Metric("memory_used_gb", "1e9 bytes", TRAIN, "by whomever"),
    Metric("celsius", "degrees", TRAIN, "of the chip"),
    Metric("watts", "W", TRAIN, "drawn"),
)
METRICS = (*AXES, *SCORES, *RUNNING, *TRAINED, *SPEED, *ONLY_IN_CSV, *ONLY_IN_WANDB)


def wandb_name(metric: Metric, split: str) -> str:
    """An axis by its own name, everything else behind train/ or val/."""
    return metric.name if metric in AXES else f"{split}/{metric.name}"
