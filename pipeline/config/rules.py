"""What a config must obey before any process starts: each refusal names field, value, rule and way out."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Iterable, Sequence

from pipeline.config.schema import Config, ConfigError, by_key


def checked(config: Config) -> Config:
    """The same config, if it can run. Raises ConfigError for the first rule that is broken."""
    c = config
    _choice("model.stem", c.model.stem, ("separable", "dense", "small"))
    _choice("model.activation", c.model.activation, ("relu", "sigmoid"))
    _choice("norm.precise_form", c.norm.precise_form, ("batches", "aggregate"))
    _choice("augment.photometric", c.augment.photometric, ("full", "reduced", "none"))
    _choice("trainer.precision", c.trainer.precision, ("32", "bf16", "64"))
    _choice("data.decoder", c.data.decoder, ("", "regions", "whole"))
    _choice("trainer.on_nan", c.trainer.on_nan, ("stop", "skip"))
    _choice("cluster.accelerator", c.cluster.accelerator, ("auto", "cpu", "cuda"))
    _choice("cluster.launcher", c.cluster.launcher, ("local", "slurm"))
    _choice("slurm.container", c.slurm.container, ("none", "apptainer", "pyxis"))
    _choice("slurm.launcher", c.slurm.launcher, ("srun", "torchrun"))
    _choice("slurm.resubmit", c.slurm.resubmit, ("requeue", "chain"))
    _choice("tracking.mode", c.tracking.mode, ("auto", "online", "offline", "disabled"))
    flat = by_key(dataclasses.asdict(c))
    for key, least in _LEAST.items():
        if flat[key] is not None and not flat[key] >= least:
            raise ConfigError(f"{key} = {flat[key]} is too small; it must be at least {least}")
    for key in _POSITIVE:
        if not flat[key] > 0 or math.isinf(flat[key]):
            raise ConfigError(f"{key} = {flat[key]} must be positive")
    for key, (low, high) in _BETWEEN.items():
        if flat[key] is not None and not low <= flat[key] <= high:
            raise ConfigError(f"{key} = {flat[key]} must lie between {low} and {high}")
    for key in ("data.mean", "data.std"):
        if len(flat[key]) != 3 or (key == "data.std" and min(flat[key]) <= 0):
            raise ConfigError(f"{key} = {flat[key]} must be three numbers, of red, green and blue; std above 0")
    size = c.cluster.devices if c.norm.group_size == "node" else c.norm.group_size
    if not isinstance(size, int) or size < 0:
        raise ConfigError(f'norm.group_size = {size!r} is not offered; give a number of ranks, 0 for all, or "node"')
    if size and c.world % size:
        divisors = [g for g in range(1, c.world + 1) if c.world % g == 0]
        raise ConfigError(
            f"norm.group_size = {size} does not divide the world of {c.world} ranks; "
            f"choose one of {divisors}, or 0 for all"
        )
    if c.trainer.spike_factor and c.trainer.spike_factor <= 1:
        raise ConfigError(f"trainer.spike_factor = {c.trainer.spike_factor} would take every loss for a spike; it must "
                          "be above 1, or 0 for none")  # fmt: skip
    if c.data.stage and not c.data.cache and "://" not in c.data.root:  # shards of a URL are on the node always
        raise ConfigError("data.stage = true copies shards to data.cache, which is not set; give a directory on the "
                          "nodes' own disks, as data.cache='$SLURM_TMPDIR/pipeline'")  # fmt: skip
    if c.trainer.max_epochs < 0 and c.trainer.max_steps < 0:
        raise ConfigError("trainer.max_epochs and trainer.max_steps are both -1, the run would not end; set one")
    if os.sep in c.run.id or c.run.id in (".", ".."):
        raise ConfigError(f"run.id = {c.run.id!r} is a path; give a name, and its place with run.dir")
    if c.cluster.launcher == "slurm":
        _check_slurm(c)
    return config


def _check_slurm(c: Config) -> None:
    slurm = c.slurm
    for key, value in by_key(dataclasses.asdict(slurm), "slurm.").items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.isprintable():
                raise ConfigError(f"{key} holds {text!r}: a line break or control character; give plain text")
    if slurm.container != "none" and not slurm.image:
        raise ConfigError(f"slurm.container = {slurm.container} needs an image; set slurm.image")
    for key, names, shown in (("interface", _INTERFACES, "ip link"), ("infiniband", _ADAPTERS, "ibv_devices")):
        if not names.fullmatch(value := getattr(slurm, key)):
            raise ConfigError(f"slurm.{key} = {value!r} is no list of names; give them as `{shown}` shows them, with "
                              "commas, or \"\" to leave the choice to NCCL")  # fmt: skip
    for option in slurm.options:
        if not option.startswith("--"):
            raise ConfigError(f"slurm.options holds {option!r}, which is no option of sbatch; write --name=value")
    for mount in slurm.mounts:
        parts = mount.split(":")
        absolute = all(part.startswith("/") for part in parts[:2])
        if "," in mount or not absolute or len(parts) > 3 or (len(parts) == 3 and parts[2] not in ("ro", "rw")):
            raise ConfigError(f"slurm.mounts holds {mount!r}; write SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro, as "
                              "absolute paths without commas")  # fmt: skip
    if slurm.lead_minutes and slurm.minutes and slurm.lead_minutes >= slurm.minutes:
        raise ConfigError(f"slurm.lead_minutes = {slurm.lead_minutes} leaves nothing of slurm.minutes = "
                          f"{slurm.minutes}; lower it, or 0 for no signal")  # fmt: skip
    if slurm.lead_minutes and slurm.lead_minutes * 60 < c.cluster.lead_seconds:
        raise ConfigError(f"slurm.lead_minutes = {slurm.lead_minutes} is shorter than cluster.lead_seconds = "
                          f"{c.cluster.lead_seconds:g}, the time for a last checkpoint; raise it, or 0 for no signal"
                          )  # fmt: skip


_INTERFACES = re.compile(r"|[\w.:@-]+(,[\w.:@-]+)*", re.ASCII)
_ADAPTERS = re.compile(r"|\^?=?[\w.:-]+(,[\w.:-]+)*", re.ASCII)  # ^ = all but these, "=" = exactly these: both NCCL's
_LEAST = {
    "norm.precise_images": 0, "data.num_classes": 0, "data.image_size": 1,
    "data.global_batch_size": 1, "data.micro_batch_size": 0, "data.window": 0, "data.cache_gb": 0,
    "optimizer.rate_batch_size": 1,
    "optimizer.weight_decay": 0, "schedule.warmup_epochs": 0, "loss.auxiliary_weight": 0, "trainer.max_epochs": -1,
    "trainer.max_steps": -1, "trainer.threads": 0, "trainer.validate_every_epochs": 0,
    "trainer.checkpoint_every_steps": 0, "trainer.checkpoint_every_minutes": 0, "trainer.keep_checkpoints": 1,
    "run.stalled_starts": 0, "cluster.nodes": 1, "cluster.devices": 1, "cluster.lead_seconds": 1,
    "cluster.hang_seconds": 0, "trainer.spike_factor": 0,
    "cluster.workers": -1, "tracking.every_steps": 1, "tracking.norms_every_steps": 0, "slurm.minutes": 0,
    "slurm.lead_minutes": 0, "slurm.cpus_per_task": 0, "slurm.gpus_per_node": -1, "slurm.restarts": 0,
}  # fmt: skip
_POSITIVE = (
    "model.width", "model.initial_gain", "norm.eps", "optimizer.rate", "schedule.decay_factor",
    "schedule.decay_epochs", "cluster.timeout_minutes",
)  # fmt: skip
_BETWEEN = {
    "seed": (0, 2**32 - 1), "model.dropout": (0, 0.999),
    "norm.momentum": (0, 1), "data.evaluation_crop": (0.05, 1), "data.bad_samples": (0, 1),
    "augment.area_min": (0, 1),
    "optimizer.momentum": (0, 0.9999), "loss.label_smoothing": (0, 0.999),
}  # fmt: skip


def _choice(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key} = {value!r} is not offered{nearest(value, allowed)}; choose one of {list(allowed)}")


def nearest(word: str, offered: Iterable[str]) -> str:
    offered = list(offered)
    near = difflib.get_close_matches(word, offered, n=1)
    near = near or [key for key in offered if key.rpartition(".")[2] == word.rpartition(".")[2]][:1]
    return f"; did you mean {near[0]}?" if near else ""
