"""What a run is: the schema with units and the meaning of zero, composed over recipe, data and cluster, and checked.

Only this file knows Hydra. Everything is checked here, where the user types, before any process
starts. What a run *is* (its identity) must stay on resume; where it *happens* may change.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

SCHEMA = 1
AXES = ("recipe", "data", "cluster")
_BESIDE, _INSIDE = Path(__file__).parents[1] / "conf", Path(__file__).parent / "conf"
CONF = _INSIDE if _INSIDE.is_dir() else _BESIDE  # inside the package once it is built as a wheel


class ConfigError(Exception):
    """A configuration that cannot run: the message names field, value, rule and way out."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Which run this is. Its directory is dir/id."""

    id: str = ""  # "" = made from recipe, data and the time; an existing one resumes that run
    dir: str = "runs"
    stalled_starts: int = 5  # starts in a row that failed and got no further, before the next is refused; 0 = never
    recipe: str = ""  # the choices on the three axes, filled in when composed
    data: str = ""
    cluster: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. All but name and dropout apply to our own networks only."""

    name: str = "bn_inception"  # bn_inception, inception, or a torchvision classifier
    width: float = 1.0  # factor on all channels
    stem: str = "separable"  # separable and dense are 7x7/2; small is 3x3/1, for images of 16 to 64 pixels
    activation: str = "relu"  # relu or sigmoid
    dropout: float | None = None  # before the last layer; null = the model's own rate
    response_norm: bool = False  # local response normalization in the stem
    auxiliary_head: bool = False
    literal_fig5: bool = False  # 128 instead of 96 channels in two projections, as printed
    initial_gain: float = 1.0  # factor on the standard deviation of initial convolution weights


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Which ranks share batch statistics, and how population statistics are kept."""

    group_size: int | str = 0  # ranks that share statistics; 0 = all, 1 = each its own, node = those of a node
    momentum: float = 0.1  # weight of the new batch (torch's sense); torchvision's networks keep their own, and eps
    eps: float = 1e-3
    precise_images: int = 8192  # training images for population statistics before a validation; 0 = running average
    precise_form: str = "batches"  # mean of their variances (Algorithm 2), or aggregate: one variance of all values


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The packed images, and how many make up a batch."""

    root: str = ""  # directory or http(s), s3 or gs URL of shards
    train: str = ""  # brace pattern or glob of the training shards below root; "" = by dataset.json, or by their names
    val: str = ""  # the same of the validation shards
    source: str = ""  # packed into root on first use where root is absent; "" = never
    num_classes: int = 0  # 0 = as many as the data set names
    image_size: int = 224  # pixels a side, training and evaluation
    global_batch_size: int = 256  # images an optimizer step, over all ranks
    micro_batch_size: int = 0  # images a rank holds at once; 0 = its whole share; less accumulates gradients
    window: int = 0  # shards shuffled together; 0 = all
    cache: str = ""  # directory for remote shards, and for indexes of read-only roots; "" = ~/.cache/pipeline
    cache_gb: float = 0.0  # limit on remote shards kept on a node, in 1e9 bytes; 0 = none
    bad_samples: float = 1e-4  # fraction of an epoch's images that may be unreadable and replaced; more stop the run
    evaluation_crop: float = 0.875  # fraction of the shorter side that evaluation sees
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])  # of pixels in 0..1
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    decoder: str = ""  # of JPEGs: regions or whole; "" = regions where that is installed, fixed at the run's start
    digest: str = ""  # of the data set, filled in when the run starts

    @property
    def location(self) -> tuple[str, str, str, str, int]:
        """Where the data set lies: root, train, val, cache, and the cache's limit in bytes."""
        return self.root, self.train, self.val, self.cache, round(self.cache_gb * 1e9)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training images are varied."""

    area_min: float = 0.08  # smallest crop, fraction of the image's area; 1 = the whole image
    flip: bool = True
    photometric: str = "full"  # full, reduced or none


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """SGD with momentum. The rate is stated for rate_batch_size images and scales with the global batch."""

    rate: float = 0.0015
    rate_batch_size: int = 32  # images
    momentum: float = 0.9
    weight_decay: float = 2e-4  # on weights of convolutions and linear layers; torch's sense, half the square


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Rate over time: linear warm-up from the unscaled rate, and exponential decay at every step."""

    decay_factor: float = 0.96
    decay_epochs: float = 8.0  # epochs in which the rate falls by decay_factor
    warmup_epochs: float = 0.0  # from `rate` itself to the rate of the global batch


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Cross-entropy."""

    label_smoothing: float = 0.0
    auxiliary_weight: float = 0.3  # of the auxiliary head's loss, where there is one


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long, how exactly, and how often to look."""

    max_epochs: int = 90
    max_steps: int = -1  # optimizer steps; -1 = max_epochs alone decides
    precision: str = "32"  # 32, bf16 (mixed) or 64
    deterministic: bool = True  # same ranks, device type, versions and threads give the same bits
    threads: int = 0  # CPU threads of a process; 0 = cores / processes of the node, fixed at the run's start
    validate_every_epochs: int = 1  # 0 = only at the end
    checkpoint_every_steps: int = 0  # besides one after each epoch; 0 = none besides
    checkpoint_every_minutes: float = 10.0  # since the last one, by the leading rank's clock; 0 = never for that
    keep_checkpoints: int = 2  # newest ones kept, besides the best
    on_nan: str = "stop"  # a loss that is no number, or a spike: stop, or skip (go back to the newest checkpoint, and
    # never train on that global batch: RUN/skipped.jsonl)
    spike_factor: float = 0.0  # times the median loss of the last 64 steps that count as a spike; 0 = none do


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the run happens."""

    launcher: str = "local"  # local = `pipeline train` on this machine; slurm = `pipeline launch` submits a job
    nodes: int = 1
    devices: int = 1  # processes a node, one a GPU
    accelerator: str = "auto"  # auto, cpu or cuda
    workers: int = -1  # decoding processes a rank; 0 = decode in the training process; -1 = 0 on CPU, on CUDA a
    # core less than the node has for each rank
    timeout_minutes: float = 10.0  # a collective that takes longer ends the run
    hang_seconds: float = 40.0  # without any move, after which a rank is named; half as long again, and all end (3.5
    # times as long where it reads or writes). Never less than 3 times the longest seen; 0 = no watch
    lead_seconds: float = 120.0  # between a signal and the end by force: time for the last checkpoint


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What is asked of Slurm, and how a job starts its processes. Read where cluster.launcher is slurm."""

    partition: str = ""  # several with commas; "" = the cluster's own choice, as in the next five
    account: str = ""
    qos: str = ""
    constraint: str = ""  # features of the nodes
    exclude: str = ""  # nodes that are passed over
    memory: str = ""  # of a node, as 480G; 0 = all it has
    minutes: int = 1440  # after which a start ends; 0 = the partition's limit
    lead_minutes: int = 5  # before that end a signal says so, and the job goes on in a new start; 0 = no signal
    cpus_per_task: int = 0  # cores of a process; 0 = the cluster's own choice
    gpus_per_node: int = -1  # 0 = none; -1 = one a process, none where cluster.accelerator is cpu
    options: list[str] = field(default_factory=list)  # more of sbatch's: ["--reservation=name"]
    modules: list[str] = field(default_factory=list)  # loaded before the start
    setup: list[str] = field(default_factory=list)  # lines of bash that the job runs before the start, as they are
    python: str = ""  # the interpreter that has this package; "" = the one that launches, in a container python3
    container: str = "none"  # none, apptainer or pyxis
    image: str = ""  # a .sif or .sqsh file, or what the container's tool takes for one
    mounts: list[str] = field(default_factory=list)  # SOURCE[:TARGET[:ro]]; the run's and the data's are always there
    launcher: str = "srun"  # srun = a task a process; torchrun = a task a node
    resubmit: str = "requeue"  # how an interrupted job goes on: requeue = the same job; chain = one that follows it
    restarts: int = 100  # starts after the first that the job gives itself; 0 = none. Slurm's own are not bounded
    interface: str = ""  # network of NCCL and gloo, as ib0; "" = left to them


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What is reported where. metrics.csv is always written."""

    mode: str = "auto"  # auto (online with a key, else offline), online, offline or disabled
    entity: str | None = None
    project: str = "pipeline"
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    every_steps: int = 10  # optimizer steps between rows


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run, complete."""

    schema: int = SCHEMA
    run: RunConfig = field(default_factory=RunConfig)
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    norm: NormConfig = field(default_factory=NormConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    ledger: bool = False  # write the keys of every step's samples

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return Path(self.run.dir) / self.run.id

    @property
    def way_on(self) -> str:
        """The command that goes on with the run."""
        return f"pipeline {'launch' if self.cluster.launcher == 'slurm' else 'train'} {self.directory}/config.yaml"

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.cluster.nodes * self.cluster.devices


# Where a run happens: may change when it is resumed. Everything else is what it is.
CIRCUMSTANCE = (
    "run.", "cluster.", "slurm.", "tracking.", "ledger", "data.root", "data.source", "data.micro_batch_size",
    "data.train", "data.val", "data.cache", "data.bad_samples", "trainer.max_epochs", "trainer.max_steps",
    "trainer.validate_every_epochs", "trainer.checkpoint_every_", "trainer.keep_checkpoints",
    # What to do with a batch that ruins the run is asked after it did: what was skipped is on record in the run.
    "trainer.on_nan", "trainer.spike_factor",
)  # fmt: skip


def compose_config(overrides: Sequence[str]) -> Config:
    """The checked config of `key=value` overrides, later ones winning. Raises ConfigError."""
    for override in overrides:
        _check_override(override)
    ConfigStore.instance().store(name="schema", node=dataclasses.asdict(Config()))
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("config", overrides=list(overrides), return_hydra_config=True)
        choices = composed.hydra.runtime.choices
        OmegaConf.set_struct(composed, False)
        del composed["hydra"]
        content = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    except OverrideParseException as error:
        key, _, value = str(error.override).partition("=")
        shown = f"the value of {key}" if "://" in value else repr(error.override)  # a URL may hold a secret
        raise ConfigError(f"{shown} cannot be read; put quotes around the value: key='\"value\"'") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_first_line(error)) from None
    content["run"].update({axis: str(choices[axis]) for axis in AXES})
    return checked(from_mapping(content))


def read_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """The frozen config of a run, with overrides of single keys. Raises ConfigError."""
    try:
        loaded = OmegaConf.load(path)
        if not OmegaConf.is_dict(loaded):
            raise ConfigError(f"{path} holds no keys; give the config.yaml of a run")
        for override in overrides:
            _check_override(override)
            if override.split("=")[0] in AXES:
                raise ConfigError(f"{override}: the axes are frozen in {path}; override single keys")
            loaded.merge_with_dotlist([override])
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give the config.yaml of a run") from None
    except Exception as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: {_first_line(error)}") from None
    content = cast(dict[str, Any], OmegaConf.to_container(loaded))
    if content.get("schema") != SCHEMA:
        raise ConfigError(f"{path}: schema = {content.get('schema')}, this version reads {SCHEMA}; compose it anew")
    return checked(from_mapping(content))


def to_yaml(config: Config) -> str:
    """The complete config as text that `read_config` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def from_mapping(content: dict[str, Any]) -> Config:
    """A Config of nested plain values, typed by the schema. Raises ConfigError for a wrong type or unknown key."""
    for key in _flat(content):
        if key not in _KEYS and not any(key.startswith(known + ".") for known in _KEYS):
            raise ConfigError(f"{key} is not a key{_nearest(key, _KEYS)}")
    try:
        merged = OmegaConf.merge(_schema(), content)
    except OmegaConfBaseException as error:
        key = error.full_key or next(k for k in content if k in _SECTIONS and not isinstance(content[k], dict))
        key = key.partition("[")[0]
        raise ConfigError(f"{key} = {_at(content, key)!r} has the wrong type; it must be {_type_of(key)}") from None
    return cast(Config, OmegaConf.to_object(merged))


def _schema() -> DictConfig:
    """The schema to be merged into: frozen dataclasses come as read-only nodes, section by section."""
    schema = OmegaConf.structured(Config)
    for node in (schema, *(schema._get_node(section.name) for section in dataclasses.fields(Config))):
        if OmegaConf.is_dict(node):
            OmegaConf.set_readonly(node, False)
    return cast(DictConfig, schema)


def identity(config: Config) -> dict[str, Any]:
    """What the run is, by key: all but where it happens."""
    return {key: value for key, value in _flat(dataclasses.asdict(config)).items() if not key.startswith(CIRCUMSTANCE)}


def differences(new: Config, old: Config) -> list[str]:
    """Where the identity of two runs differs, one line each. What either leaves open (0 threads, "") agrees."""
    left, right = identity(new), identity(old)
    filled = {"trainer.threads": 0, "data.digest": "", "data.num_classes": 0, "data.decoder": ""}
    return [
        f"{key} = {left[key]!r}, the run has {right[key]!r}"
        for key in left
        if left[key] != right[key] and filled.get(key, ...) not in (left[key], right[key])
    ]  # fmt: skip


def completed(config: Config, **values: dict[str, Any]) -> Config:
    """The config with single fields of its sections set, as in `completed(c, data={"num_classes": 10})`."""
    sections = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in values.items()}
    return dataclasses.replace(config, **sections)


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
    flat = _flat(dataclasses.asdict(c))
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
    if c.trainer.max_epochs < 0 and c.trainer.max_steps < 0:
        raise ConfigError("trainer.max_epochs and trainer.max_steps are both -1, the run would not end; set one")
    if os.sep in c.run.id or c.run.id in (".", ".."):
        raise ConfigError(f"run.id = {c.run.id!r} is a path; give a name, and its place with run.dir")
    if c.cluster.launcher == "slurm":
        _check_slurm(c)
    return config


def _check_slurm(c: Config) -> None:
    slurm = c.slurm
    for key, value in _flat(dataclasses.asdict(slurm), "slurm.").items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.isprintable():
                raise ConfigError(f"{key} holds {text!r}: a line break or control character; give plain text")
    if slurm.container != "none" and not slurm.image:
        raise ConfigError(f"slurm.container = {slurm.container} needs an image; set slurm.image")
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


_LEAST = {
    "norm.precise_images": 0, "data.num_classes": 0, "data.image_size": 1,
    "data.global_batch_size": 1, "data.micro_batch_size": 0, "data.window": 0, "data.cache_gb": 0,
    "optimizer.rate_batch_size": 1,
    "optimizer.weight_decay": 0, "schedule.warmup_epochs": 0, "loss.auxiliary_weight": 0, "trainer.max_epochs": -1,
    "trainer.max_steps": -1, "trainer.threads": 0, "trainer.validate_every_epochs": 0,
    "trainer.checkpoint_every_steps": 0, "trainer.checkpoint_every_minutes": 0, "trainer.keep_checkpoints": 1,
    "run.stalled_starts": 0, "cluster.nodes": 1, "cluster.devices": 1, "cluster.lead_seconds": 1,
    "cluster.hang_seconds": 0, "trainer.spike_factor": 0,
    "cluster.workers": -1, "tracking.every_steps": 1, "slurm.minutes": 0, "slurm.lead_minutes": 0,
    "slurm.cpus_per_task": 0, "slurm.gpus_per_node": -1, "slurm.restarts": 0,
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
        raise ConfigError(f"{key} = {value!r} is not offered{_nearest(value, allowed)}; choose one of {list(allowed)}")


def _check_override(override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is not key=value; for example trainer.max_epochs=10")
    if key in AXES:
        offered = sorted(path.stem for path in (CONF / key).glob("*.yaml"))
        if value not in offered:
            raise ConfigError(f"{key} = {value!r} is not offered{_nearest(value, offered)}; choose one of {offered}")
    elif key not in _KEYS:
        raise ConfigError(
            f"{key} is not a key{_nearest(key, [*_KEYS, *AXES])}; `pipeline train --print-config` lists all"
        )


def _nearest(word: str, offered: Iterable[str]) -> str:
    offered = list(offered)
    near = difflib.get_close_matches(word, offered, n=1)
    near = near or [key for key in offered if key.rpartition(".")[2] == word.rpartition(".")[2]][:1]
    return f"; did you mean {near[0]}?" if near else ""


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


_KEYS = _flat(dataclasses.asdict(Config()))
_SECTIONS = {key.partition(".")[0] for key in _KEYS if "." in key}


def _at(content: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def _type_of(dotted: str) -> str:
    current: Any = Config
    for name in dotted.split("."):
        kind = {f.name: str(f.type) for f in dataclasses.fields(current)}[name]
        current = globals().get(kind, kind)
    return _WORDS.get(str(current), f"a section; set its keys, {dotted}.KEY")


_WORDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "str | None": "text or null",
    "int | str": "a whole number, or node",
    "float | None": "a number or null", "list[float]": "a list of numbers, [1, 2, 3]", "list[str]": "a list, [a, b]",
}  # fmt: skip


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
