"""What a config must obey before any process starts: each refusal names field, value, rule and way out."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Iterable, Sequence

from pipeline.config.schema import Config, ConfigError, DockerConfig, SkyPilotConfig, SlurmConfig, by_key


def checked(config: Config) -> Config:
    """The same config, if it can run. Raises ConfigError for the first rule that is broken."""
    c = config
    _choice("model.stem", c.model.stem, ("separable", "dense", "small"))
    _choice("model.activation", c.model.activation, ("relu", "sigmoid"))
    _choice("norm.precise_form", c.norm.precise_form, ("batches", "aggregate"))
    _choice("augment.photometric", c.augment.photometric, ("full", "reduced", "none"))
    _choice("optimizer.name", c.optimizer.name, ("sgd", "lars", "lamb"))
    _choice("schedule.form", c.schedule.form, ("exponential", "cosine", "polynomial"))
    _choice("norm.frozen", c.norm.frozen, ("", "statistics", "all"))
    if c.norm.frozen and not c.model.init:
        raise ConfigError(f"norm.frozen = {c.norm.frozen} keeps statistics that nobody has taken; give the weights "
                          "they belong to, model.init=FILE")  # fmt: skip
    if c.norm.frozen and c.norm.compare:
        raise ConfigError(f"norm.compare = true finds no running averages where norm.frozen = {c.norm.frozen}; leave "
                          "either out")  # fmt: skip
    _choice("trainer.precision", c.trainer.precision, ("32", "bf16", "64"))
    _choice("data.decoder", c.data.decoder, ("", "regions", "whole"))
    _choice("trainer.on_nan", c.trainer.on_nan, ("stop", "skip"))
    _choice("cluster.accelerator", c.cluster.accelerator, ("auto", "cpu", "cuda"))
    _choice("cluster.launcher", c.cluster.launcher, ("local", "slurm", "docker", "skypilot"))
    _choice("docker.engine", c.docker.engine, ("", "docker", "podman"))
    _choice("slurm.container", c.slurm.container, ("none", "apptainer", "pyxis"))
    _choice("slurm.launcher", c.slurm.launcher, ("srun", "torchrun"))
    _choice("slurm.resubmit", c.slurm.resubmit, ("requeue", "chain"))
    _choice("tracking.mode", c.tracking.mode, ("auto", "online", "offline", "disabled"))
    _choice("tracking.artifacts", c.tracking.artifacts, ("none", "digests", "files"))
    flat = by_key(dataclasses.asdict(c))
    for key, least in _LEAST.items():
        if flat[key] is not None and not flat[key] >= least:
            raise ConfigError(f"{key} = {flat[key]} is too small; it must be at least {least}")
        if flat[key] == math.inf and key.startswith(_COUNTED):
            raise ConfigError(f"{key} = inf has no end; give a number")
    for key in _POSITIVE:
        if not flat[key] > 0 or math.isinf(flat[key]):
            raise ConfigError(f"{key} = {flat[key]} must be positive")
    for key, (low, high) in _BETWEEN.items():
        if flat[key] is not None and not low <= flat[key] <= high:
            raise ConfigError(f"{key} = {flat[key]} must lie between {low} and {high}")
    if c.model.per_activation and c.model.name != "bn_inception":
        raise ConfigError(f"model.per_activation = {c.model.per_activation} is for model.name = bn_inception, not "
                          f"{c.model.name}; leave it at 0")  # fmt: skip
    if c.norm.compare and not c.norm.precise_images:
        raise ConfigError("norm.compare = true sets running averages beside population statistics, of which "
                          "norm.precise_images = 0 makes none; set norm.precise_images=8192, or leave compare out"
                          )  # fmt: skip
    for key in ("data.mean", "data.std"):
        if len(flat[key]) != 3 or (key == "data.std" and min(flat[key]) <= 0):
            raise ConfigError(f"{key} = {flat[key]} must be three numbers, of red, green and blue; std above 0")
    statistics_group(c, c.world)
    size = c.cluster.devices if c.norm.group_size == "node" else c.norm.group_size
    if not isinstance(size, int) or size < 0:
        raise ConfigError(f'norm.group_size = {size!r} is not offered; give a number of ranks, 0 for all, or "node"')
    if size and c.world % size:
        divisors = [g for g in range(1, c.world + 1) if c.world % g == 0]
        raise ConfigError(
            f"norm.group_size = {size} does not divide the world of {c.world} ranks; "
            f"choose one of {divisors}, or 0 for all"
        )
    _check_descent(c)
    _check_growth(c)
    if c.model.zero_gamma and c.model.name in ("bn_inception", "inception", "bn_mlp", "mlp"):
        raise ConfigError(f"model.zero_gamma = true: {c.model.name} has no residual branch beside which it could begin "
                          "as nothing, and behind a gamma of 0 no weight would learn; leave it at false")  # fmt: skip
    if c.averaging.decay and c.norm.compare:
        raise ConfigError("norm.compare = true sets running averages of the trained weights beside validations of the "
                          "averaged ones, averaging.decay; leave one of them out")  # fmt: skip
    if c.averaging.decay and not c.norm.precise_images and c.model.name not in ("inception", "mlp"):
        raise ConfigError(f"averaging.decay = {c.averaging.decay} needs statistics of the averaged weights' own, and "
                          "norm.precise_images = 0 estimates none; set it to 8192")  # fmt: skip
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
    check = {"slurm": _check_slurm, "docker": _check_docker, "skypilot": _check_skypilot}.get(c.cluster.launcher)
    if check is not None:
        check(c)
    return config


def statistics_group(c: Config, world: int) -> int | str:
    """Ranks that share statistics in a world of so many, as norm.group_size says it. Raises ConfigError.

    norm.group_images asks for as many as hold no more images than that, and no fewer than a quarter: shares of a batch
    are runs of places, so that the same images are together on any number of ranks that divides them alike.
    """
    most, batch, micro = c.norm.group_images, c.data.global_batch_size, c.data.micro_batch_size
    if not most:
        return c.norm.group_size
    if c.norm.group_size:
        raise ConfigError(f"norm.group_size = {c.norm.group_size} and norm.group_images = {most} say the same thing "
                          "twice; leave one at 0")  # fmt: skip
    at_once = world * (-(-batch // (world * micro)) if micro else 1)  # shares that the global batch is cut into
    largest, smallest = -(-batch // at_once), batch // at_once
    if largest > most:
        raise ConfigError(f"norm.group_images = {most}, and one of {world} ranks holds {largest} images at once; set "
                          f"data.micro_batch_size={most}, or run on {-(-batch // most)} ranks or more")  # fmt: skip
    sizes = [g for g in range(1, world + 1) if world % g == 0]
    group = max(g for g in sizes if g * largest <= most)
    if group == world:
        return 0
    if group * smallest * 4 < most:
        raise ConfigError(f"norm.group_images = {most}: {world} ranks of {smallest} images make groups of "
                          f"{[g * smallest for g in sizes]}, none of {-(-most // 4)} to {most}; choose another number "
                          "of ranks, or norm.group_size")  # fmt: skip
    return group


def _check_descent(c: Config) -> None:
    optimizer, schedule = c.optimizer, c.schedule
    if optimizer.nesterov and optimizer.name == "lamb":
        raise ConfigError("optimizer.nesterov = true is not of lamb; set it to false, or optimizer.name to lars or sgd")
    if optimizer.nesterov and not optimizer.momentum:
        raise ConfigError("optimizer.nesterov = true looks ahead along a momentum, and optimizer.momentum = 0; raise "
                          "it, or set nesterov to false")  # fmt: skip
    if optimizer.trust_clip and optimizer.name == "sgd":
        raise ConfigError("optimizer.trust_clip = true clips a ratio that sgd does not have; set it to false, or "
                          "optimizer.name to lars or lamb")  # fmt: skip
    if schedule.form == "exponential":
        return
    epochs = schedule.epochs or c.trainer.max_epochs
    if epochs < 0:
        raise ConfigError(f"schedule.form = {schedule.form} needs an end, and trainer.max_epochs = -1; set "
                          "schedule.epochs")  # fmt: skip
    if epochs <= schedule.warmup_epochs:
        raise ConfigError(f"schedule.warmup_epochs = {schedule.warmup_epochs:g} leaves nothing of the {epochs:g} "
                          f"epochs of the {schedule.form} (schedule.epochs, or trainer.max_epochs); lower it"
                          )  # fmt: skip


def _check_growth(c: Config) -> None:
    augment = c.augment
    if augment.first_size == 1:
        return
    if not augment.growth_epochs:
        raise ConfigError("augment.growth_epochs = 0 leaves no epoch for augment.first_size; set it to the epochs in "
                          "which images grow, or first_size to 1")  # fmt: skip
    if c.model.name in ("bn_mlp", "mlp") or c.model.per_activation:
        what = "model.per_activation" if c.model.per_activation else f"model.name = {c.model.name}"
        raise ConfigError(f"augment.first_size = {augment.first_size} is not for {what}, which takes images of one "
                          "size; set it to 1, or choose another model")  # fmt: skip


# A variable of a secret's name, given anything but what another variable or command says.
_SECRET = re.compile(r"\b(\w*(?:_KEY|TOKEN|SECRET|PASSWORD))=(?![\"']?\$)[\"']?\w")


def _check_slurm(c: Config) -> None:
    slurm = c.slurm
    _check_plain(slurm, "slurm.")
    if slurm.container != "none" and not slurm.image:
        raise ConfigError(f"slurm.container = {slurm.container} needs an image; set slurm.image")
    for key, names, shown in (("interface", _INTERFACES, "ip link"), ("infiniband", _ADAPTERS, "ibv_devices")):
        if not names.fullmatch(value := getattr(slurm, key)):
            raise ConfigError(f"slurm.{key} = {value!r} is no list of names; give them as `{shown}` shows them, with "
                              "commas, or \"\" to leave the choice to NCCL")  # fmt: skip
    for option in slurm.options:
        if not option.startswith("--"):
            raise ConfigError(f"slurm.options holds {option!r}, which is no option of sbatch; write --name=value")
    _check_mounts("slurm.mounts", slurm.mounts)
    for line in slurm.setup:
        if secret := _SECRET.search(line):
            raise ConfigError(f"slurm.setup gives {secret[1]} a value, which would stand in config.yaml, in the script "
                              f"and in W&B; keep it in a file of mode 0600: export {secret[1]}=$(<FILE)")  # fmt: skip
    if slurm.lead_minutes and slurm.minutes and slurm.lead_minutes >= slurm.minutes:
        raise ConfigError(f"slurm.lead_minutes = {slurm.lead_minutes} leaves nothing of slurm.minutes = "
                          f"{slurm.minutes}; lower it, or 0 for no signal")  # fmt: skip
    if slurm.lead_minutes and slurm.lead_minutes * 60 < c.cluster.lead_seconds:
        raise ConfigError(f"slurm.lead_minutes = {slurm.lead_minutes} is shorter than cluster.lead_seconds = "
                          f"{c.cluster.lead_seconds:g}, the time for a last checkpoint; raise it, or 0 for no signal"
                          )  # fmt: skip


def _check_docker(c: Config) -> None:
    docker = c.docker
    _check_plain(docker, "docker.")
    _check_image("docker.image", docker.image)
    _check_mounts("docker.mounts", docker.mounts)
    _check_names("docker.variables", docker.variables)
    if not _USER.fullmatch(docker.user):
        raise ConfigError(f"docker.user = {docker.user} is not read; write numbers, UID or UID:GID, or leave it out "
                          "for who launches")  # fmt: skip
    if not _SIZE.fullmatch(docker.shared_memory):
        raise ConfigError(f"docker.shared_memory = {docker.shared_memory} is no size; write it as 8g or 512m, or host "
                          "for that of the machine")  # fmt: skip
    if not _GPUS.fullmatch(docker.gpus):
        raise ConfigError(f"docker.gpus = {docker.gpus} is not read; write all, or numbers as 0,1")
    if docker.gpus != "all" and len(set(docker.gpus.split(","))) < c.cluster.devices:
        raise ConfigError(f"docker.gpus = {docker.gpus} are fewer than cluster.devices = {c.cluster.devices}; name one "
                          "for each process")  # fmt: skip
    if not _VOLUME.fullmatch(docker.scratch) and not docker.scratch.startswith("/"):
        raise ConfigError(f"docker.scratch = {docker.scratch} is neither the name of a volume nor an absolute "
                          "directory; write it as pipeline-scratch or /nvme/scratch")  # fmt: skip
    for option in docker.options:
        if not option.startswith("--"):
            raise ConfigError(f"docker.options holds {option!r}, which is no option of docker run; write --name=value")
        if option.partition("=")[0] in ("--env", "--env-file"):
            raise ConfigError("docker.options holds an --env, which may be a secret; give the variable's name to "
                              "docker.variables, or a file of them to docker.env_file")  # fmt: skip


def _check_skypilot(c: Config) -> None:
    sky = c.skypilot
    _check_plain(sky, "skypilot.")
    if not sky.image:
        raise ConfigError("skypilot.image is not set, and the nodes must pull one; push the image to a registry, and "
                          "give skypilot.image=REGISTRY/NAME:TAG")  # fmt: skip
    _check_image("skypilot.image", sky.image)
    _check_names("skypilot.secrets", sky.secrets)
    if not _BUCKET.fullmatch(sky.bucket):
        shown = sky.bucket if "@" not in sky.bucket else "a URL with credentials"
        raise ConfigError(f"skypilot.bucket = {shown or repr('')} is no bucket, and a run must outlive its machines; "
                          f"write it as s3://NAME/runs ({', '.join(_BUCKETS)})")  # fmt: skip
    if c.cluster.accelerator != "cpu" and not _ACCELERATOR.fullmatch(sky.accelerator):
        raise ConfigError(f"skypilot.accelerator = {sky.accelerator!r} is no name of one; write it as H100, and their "
                          "number with cluster.devices")  # fmt: skip
    for key, size in (("skypilot.cpus", sky.cpus), ("skypilot.memory", sky.memory)):
        if not _AT_LEAST.fullmatch(size):
            raise ConfigError(f"{key} = {size} is not read; write a number, as 96, or 96+ for at least as much")
    if "://" not in c.data.root and c.data.source != "digits":
        raise ConfigError(f"data.root = {c.data.root} is a directory of this machine, which rented nodes do not see; "
                          "copy it to a bucket, and give its s3://, gs:// or https:// URL")  # fmt: skip


def _check_plain(section: SlurmConfig | DockerConfig | SkyPilotConfig, prefix: str) -> None:
    for key, value in by_key(dataclasses.asdict(section), prefix).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.isprintable():
                raise ConfigError(f"{key} holds {text!r}: a line break or control character; give plain text")


def _check_mounts(key: str, mounts: Sequence[str]) -> None:
    for mount in mounts:
        parts = mount.split(":")
        absolute = all(part.startswith("/") for part in parts[:2])
        if "," in mount or not absolute or len(parts) > 3 or (len(parts) == 3 and parts[2] not in ("ro", "rw")):
            raise ConfigError(f"{key} holds {mount!r}; write SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro, as absolute "
                              "paths without commas")  # fmt: skip


def _check_image(key: str, image: str) -> None:
    if not image or image.startswith("-") or " " in image:
        raise ConfigError(f"{key} = {image!r} names no image; write it as pipeline, or REGISTRY/NAME:TAG")


def _check_names(key: str, names: Sequence[str]) -> None:
    for name in names:
        if not _NAME.fullmatch(name):  # not shown: what stands behind a = may be a secret
            raise ConfigError(f"{key} holds {name.partition('=')[0]!r} with more than a name; give names of variables "
                              "alone, their values stay in the environment")  # fmt: skip


_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_USER = re.compile(r"(\d+(:\d+)?)?", re.ASCII)
_SIZE = re.compile(r"[1-9]\d*[bkmg]?|host", re.ASCII)
_GPUS = re.compile(r"all|\d+(,\d+)*", re.ASCII)
_VOLUME = re.compile(r"[A-Za-z0-9][\w.-]+", re.ASCII)
_BUCKETS = ("s3", "gs", "r2", "oci", "nebius")
_BUCKET = re.compile(rf"({'|'.join(_BUCKETS)})://[a-z0-9][\w.-]+(/[^/?#@]+)*/?", re.ASCII)
_ACCELERATOR = re.compile(r"[A-Za-z][\w.-]*", re.ASCII)
_AT_LEAST = re.compile(r"(\d+(\.\d+)?\+?)?", re.ASCII)
_INTERFACES = re.compile(r"|[\w.:@-]+(,[\w.:@-]+)*", re.ASCII)
_ADAPTERS = re.compile(r"|\^?=?[\w.:-]+(,[\w.:-]+)*", re.ASCII)  # ^ = all but these, "=" = exactly these: both NCCL's
_LEAST = {
    "norm.precise_images": 0, "norm.group_images": 0, "data.num_classes": 0, "data.image_size": 1,
    "data.global_batch_size": 1, "data.micro_batch_size": 0, "data.window": 0, "data.cache_gb": 0,
    "optimizer.rate_batch_size": 1,
    "schedule.epochs": 0, "augment.operations": 0, "augment.magnitude_spread": 0,
    "averaging.every_steps": 1, "averaging.start_epochs": 0, "augment.growth_steps": 1, "augment.growth_epochs": 0,
    "optimizer.weight_decay": 0, "schedule.warmup_epochs": 0, "loss.auxiliary_weight": 0, "trainer.max_epochs": -1,
    "trainer.max_steps": -1, "trainer.threads": 0, "trainer.validate_every_epochs": 0,
    "trainer.checkpoint_every_steps": 0, "trainer.checkpoint_every_minutes": 0, "trainer.keep_checkpoints": 1,
    "run.stalled_starts": 0, "cluster.nodes": 1, "cluster.devices": 1, "cluster.lead_seconds": 1,
    "cluster.hang_seconds": 0, "trainer.spike_factor": 0,
    "cluster.workers": -1, "tracking.every_steps": 1, "tracking.norms_every_steps": 0, "slurm.minutes": 0,
    "tracking.system_every_seconds": 0,
    "tracking.percentiles_every_steps": 0, "tracking.gradients_every_steps": 0,
    "slurm.lead_minutes": 0, "slurm.cpus_per_task": 0, "slurm.gpus_per_node": -1, "slurm.restarts": 0,
    "skypilot.disk_gb": 0,
}  # fmt: skip
_COUNTED = ("schedule.", "augment.", "averaging.")  # by which a run's steps are reckoned
_POSITIVE = (
    "model.width", "model.initial_gain", "norm.eps", "optimizer.rate", "optimizer.trust_coefficient", "schedule.power",
    "schedule.decay_factor",
    "schedule.decay_epochs", "cluster.timeout_minutes",
)  # fmt: skip
_BETWEEN = {
    "seed": (0, 2**32 - 1), "model.dropout": (0, 0.999), "model.per_activation": (0, 10),
    "norm.momentum": (0, 1), "data.evaluation_crop": (0.05, 1), "data.bad_samples": (0, 1),
    "augment.area_min": (0, 1), "augment.magnitude": (0, 10), "augment.mixup": (0, 2),
    "augment.cutmix": (0, 2), "augment.first_size": (0.1, 1),
    "docker.port": (1024, 65535),
    "averaging.decay": (0, 0.999999), "schedule.final_factor": (0, 1), "schedule.warmup_factor": (0, 1),
    "optimizer.second_momentum": (0, 0.99999),
    "tracking.goodput_alert": (0, 1), "optimizer.momentum": (0, 0.9999), "loss.label_smoothing": (0, 0.999),
}  # fmt: skip


def _choice(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key} = {value!r} is not offered{nearest(value, allowed)}; choose one of {list(allowed)}")


def nearest(word: str, offered: Iterable[str]) -> str:
    offered = list(offered)
    near = difflib.get_close_matches(word, offered, n=1)
    near = near or [key for key in offered if key.rpartition(".")[2] == word.rpartition(".")[2]][:1]
    return f"; did you mean {near[0]}?" if near else ""
