"""All checks of a run, in the order of its table; each is given plain values, taken from the config here."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from pipeline.callbacks.wandb_server import WandbPlace, last_position_on_server, wandb_mode
from pipeline.config import Config, ConfigError, completed, differences, identity, read_config, statistics_group
from pipeline.data.augment import Preparation
from pipeline.data.dataset import Dataset, Location
from pipeline.data.decode import DECODER, REGIONS
from pipeline.data.shards import MANIFEST, difference, read_manifest
from pipeline.data.split import Split
from pipeline.data.stream import ShardStream
from pipeline.doctor import (
    arithmetic,
    cloud,
    directory,
    engine,
    machine,
    network,
    pace,
    packed,
    presence,
    slurm,
    versions,
)  # fmt: skip
from pipeline.doctor.composition import compose
from pipeline.doctor.findings import FAULT, Finding, guarded, of_message, ok
from pipeline.doctor.tracking import check_tracking
from pipeline.launch.plan import CONFIG, RECORD, STARTED, agreed, identified, read_record, worker_count
from pipeline.launch.slurm import render
from pipeline.launch.targets import cloud_task, container_of, slurm_job
from pipeline.models.registry import check_name
from pipeline.norm import SyncBatchNorm
from pipeline.run.assembly import build_augmentation, build_descent, build_model, build_schedule, check_sizes
from pipeline.run.initial import initialize, with_digest
from pipeline.training.checkpoint import checkpoints
from pipeline.training.classifier import Classifier
from pipeline.training.loss import Loss

SERVER_SECONDS, PACE_SECONDS = 3.0, 2.0
REMOTE_IMAGES = 8  # that are read from a server
Check = tuple[str, str, Callable[[], Iterable[Finding]]]  # section, name, and what finds


@dataclass(slots=True)
class _Patient:
    """What the checks of one examination learn, and later ones build on."""

    config: Config
    scratch: Path
    script: str = ""  # of its job, where that is made already
    dataset: Dataset | None = None
    splits: dict[str, Split] = field(default_factory=dict)
    model: nn.Module | None = None  # on the meta device: shapes without memory
    frozen: Config | None = None  # of the run that this one would go on with

    @property
    def images(self) -> int:
        return self.dataset.manifest.count("train") if self.dataset and self.dataset.manifest.splits.get("train") else 0

    @property
    def classes(self) -> int:
        return self.config.data.num_classes or (len(self.dataset.manifest.classes) if self.dataset else 0)

    @property
    def cut(self) -> arithmetic.Cut:
        c = self.config
        size = statistics_group(c, c.world)
        group = c.cluster.devices if size == "node" else int(size)
        batch, micro = c.data.global_batch_size, c.data.micro_batch_size
        if c.norm.group_images and micro * c.world >= batch:  # a bound that goes with groups, of no use here
            micro = 0
        return arithmetic.Cut(batch, c.world, micro, group)

    @property
    def cuda(self) -> bool:
        return self.config.cluster.accelerator != "cpu" and torch.cuda.is_available()

    @property
    def threads(self) -> int:
        """Of a rank, as a start fixes them."""
        return self.config.trainer.threads or max(1, (os.cpu_count() or 1) // self.config.cluster.devices)

    @property
    def workers(self) -> int:
        """Of a rank, on this machine."""
        return worker_count(self.config, cuda=self.cuda)


Say = Callable[[str], None]


def examine(words: Sequence[str], say: Say = lambda text: None) -> Iterator[Finding]:
    """All findings of what was typed, as they come. say: told what is being looked at."""
    config: list[Config] = []

    def composition() -> list[Finding]:
        composed, found = compose(words)
        config.extend([composed] if composed else [])
        return found

    say("config")
    yield from guarded("config", "config", composition)
    if not config:
        yield from guarded("machine", "temporary files", lambda: machine.check_temporary(os.environ))
        return
    yield from examine_run(config[0], say)


def examine_run(config: Config, say: Say = lambda text: None, *, script: str = "", pace: bool = True
                ) -> Iterator[Finding]:  # fmt: skip
    """All findings of a run. script: that of its job, rendered here where none is given. pace: take steps, too."""
    with tempfile.TemporaryDirectory(prefix="pipeline-doctor-", ignore_cleanup_errors=True) as scratch:
        for section, name, check in _checks(_Patient(config, Path(scratch), script)):
            if pace or section != "pace":
                say(name)
                yield from guarded(section, name, check)


def _checks(p: _Patient) -> Iterator[Check]:
    """Every check; those that need what another has found come only where it has."""
    yield "versions", "JPEG extension", lambda: versions.check_decoder(p.config.data.decoder, DECODER == REGIONS)
    yield from _data_checks(p)
    yield "arithmetic", "model", lambda: _model(p)  # whose size depends on the classes of the data
    if p.config.model.init:
        yield "arithmetic", "weights", lambda: _weights(p)
    if p.model is not None and p.config.augment.first_size < 1:
        yield "arithmetic", "sizes", lambda: _sizes(p)
    yield from _arithmetic_checks(p)
    yield from _directory_checks(p)
    yield "tracking", "W&B", lambda: _tracking(p.config)
    yield from _machine_checks(p)
    yield from _slurm_checks(p)
    yield from _docker_checks(p.config)
    yield from _cloud_checks(p.config)
    if p.model is not None and p.images >= p.config.data.global_batch_size:
        yield "pace", "step", lambda: _pace(p)


def _data_checks(p: _Patient) -> Iterator[Check]:
    data = p.config.data
    location = Location(*data.location)
    if location.unset_variables and _elsewhere(p.config):  # the nodes know them
        location = replace(location, cache="")
    elif location.unset_variables and location.is_cached:
        yield "data", "cache", lambda: [of_message("cache", location.unset_variables)]
        return

    def opened() -> list[Finding]:
        p.dataset, found = packed.open_here(location, data.source, p.scratch)
        return found

    yield "data", "root", opened
    if p.dataset is None:
        return
    dataset, manifest = p.dataset, p.dataset.manifest
    yield "data", "splits", lambda: packed.check_splits(manifest, data.root)
    yield "data", "digest", lambda: presence.check_digest(data.digest, manifest, _change(p), data.root)

    def tables() -> list[Finding]:
        p.splits, found = packed.check_tables(dataset, p.classes)
        return found

    yield "data", "tables", tables
    yield "data", "shards", lambda: presence.check_shards(dataset)
    yield "data", "indexes", lambda: packed.check_indexes(dataset)
    if p.splits:
        yield "data", "images", lambda: _images(dataset, list(p.splits.values()))
    if "train" in p.splits:
        split = p.splits["train"]
        yield (
            "data",
            "order",
            lambda: packed.check_mixing(
                split.shard_counts, split.label_S, data.global_batch_size, data.window, p.config.seed
            ),
        )
    if dataset.cache is not None and manifest.splits.get("train"):
        limit, entries = dataset.cache.limit, manifest.splits["train"]
        if dataset.is_staged and _elsewhere(p.config):
            unseen = f"two windows of shards fit; whether {data.cache} of the nodes has room, a start there says"
            yield "data", "cache", lambda: packed.check_cache(limit, entries, data.window, (), unseen)
            return
        yield (
            "data",
            "cache",
            lambda: packed.check_cache(limit, entries, data.window, dataset.streaming(data.window)[1:]),
        )


def _arithmetic_checks(p: _Patient) -> Iterator[Check]:
    data, trainer = p.config.data, p.config.trainer
    if p.images:
        yield "arithmetic", "batch", lambda: arithmetic.check_batch(data.global_batch_size, p.images)
    yield "arithmetic", "shares", lambda: arithmetic.check_shares(p.cut)
    if p.model is not None:
        normalized, norm = any(isinstance(m, SyncBatchNorm) for m in p.model.modules()), p.config.norm
        yield (
            "arithmetic",
            "statistics",
            lambda: arithmetic.check_statistics(p.cut, normalized, frozen=norm.frozen, group_images=norm.group_images),
        )
    if p.images >= data.global_batch_size:
        yield (
            "arithmetic",
            "rate",
            lambda: arithmetic.check_rate(
                build_schedule(p.config, images=p.images),
                arithmetic.total_steps(
                    data.global_batch_size, p.images, p.config.trainer.max_epochs, p.config.trainer.max_steps
                ),
                trainer.max_epochs,
            ),
        )
        yield (
            "arithmetic",
            "steps",
            lambda: arithmetic.check_steps(data.global_batch_size, p.images, trainer.max_epochs, trainer.max_steps),
        )


def _directory_checks(p: _Patient) -> Iterator[Check]:
    c, place = p.config, p.config.directory if p.config.run.id else Path(p.config.run.dir)
    yield "directory", "write", lambda: directory.check_writable(place)
    if p.model is not None and c.cluster.launcher != "skypilot":  # whose checkpoints are in a bucket
        size = directory.checkpoint_bytes(p.model, 8 if c.trainer.precision == "64" else 4)
        yield "directory", "space", lambda: directory.check_space(place, size, c.trainer.keep_checkpoints)
    if not c.run.id or not place.is_dir():
        return

    def run() -> Iterator[Finding]:
        if (place / CONFIG).exists() and (place / STARTED).exists():
            p.frozen = read_config(place / CONFIG)
        here = completed(c, data={"digest": p.dataset.manifest.digest, "num_classes": p.classes}) if p.dataset else c
        yield from directory.check_run(c, differences(here, p.frozen) if p.frozen else ())

    yield "directory", "holder", lambda: directory.check_holder(place)
    yield "directory", "run", run
    if p.frozen is not None:
        frozen = p.frozen
        yield "directory", "checkpoint", lambda: directory.check_checkpoints(place / "checkpoints", identity(frozen))


def _machine_checks(p: _Patient) -> Iterator[Check]:
    c = p.config
    cluster, devices = c.cluster, c.cluster.devices
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield "machine", "clock", lambda: machine.check_clock(time.time(), _written(Path(c.run.dir)))
    yield "machine", "temporary files", lambda: machine.check_temporary(os.environ)
    if _elsewhere(c):
        return  # the rest would be of this machine
    yield (
        "machine",
        "devices",
        lambda: machine.check_devices(
            cluster.accelerator, devices, gpus, torch.version.cuda is not None, cluster.nodes > 1
        ),
    )
    yield (
        "machine",
        "shared memory",
        lambda: machine.check_shared_memory(devices, p.workers, max(p.cut.sizes(0)) * 3 * c.data.image_size**2, gpus),
    )
    shards = len(p.dataset.manifest.splits.get("train", [])) if p.dataset else 0
    kept = min(shards, c.data.window + 1 if c.data.window else 256, 256)
    yield "machine", "open files", lambda: machine.check_open_files(machine.open_files(), kept, p.workers)
    yield "machine", "memory", lambda: machine.check_memory(machine.available_memory(), devices, p.workers)
    yield (
        "machine",
        "processors",
        lambda: machine.check_processors(machine.available_cores(), devices, p.threads, p.workers, p.cuda),
    )
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "")
    yield "machine", "host name", lambda: network.check_host(socket.gethostname(), cluster.nodes, chosen=chosen)
    yield (
        "machine",
        "network",
        lambda: network.check_network(
            network.interfaces(),
            cluster.nodes,
            network.address_of(socket.gethostname()),
            network.infiniband(),
            os.environ,
            default=network.default_interface(),
        ),
    )


def _slurm_checks(p: _Patient) -> Iterator[Check]:
    wanted, answers = _by_slurm(p.config), True
    if not shutil.which("sbatch"):
        if wanted:
            yield "slurm", "Slurm", slurm.absent
        return

    def asked() -> list[Finding]:
        nonlocal answers
        found = list(slurm.check_submission(wanted))
        answers = all(finding.state != FAULT for finding in found)
        return found

    yield "slurm", "Slurm", asked
    if wanted and answers:
        yield "slurm", "job", lambda: _job(p)


def _docker_checks(config: Config) -> Iterator[Check]:
    if config.cluster.launcher != "docker":
        return
    docker = config.docker
    try:
        container = container_of(identified(config))
    except ConfigError as error:
        found = of_message("container", error)
        yield "docker", "container", lambda: [found]
        return
    yield "docker", "engine", lambda: engine.check_engine(container.engine, docker.image, bool(container.gpus))
    if docker.env_file:
        yield "docker", "secrets", lambda: engine.check_env_file(Path(docker.env_file))
    yield "docker", "variables", lambda: engine.check_variables(docker.variables)
    if config.cluster.nodes > 1 and not docker.address:
        yield "docker", "address", lambda: engine.check_address(container.address, config.cluster.nodes)


def _cloud_checks(config: Config) -> Iterator[Check]:
    if config.cluster.launcher != "skypilot":
        return
    sky, trainer = config.skypilot, config.trainer
    try:
        task = cloud_task(identified(config), config.directory / CONFIG)
    except ConfigError as error:
        found = of_message("task", error)
        yield "skypilot", "task", lambda: [found]
        return
    yield "skypilot", "SkyPilot", cloud.check_command
    yield "skypilot", "bucket", lambda: cloud.check_bucket(sky.bucket, config.run.id)
    yield "skypilot", "secrets", lambda: cloud.check_secrets(task.secrets)
    yield (
        "skypilot",
        "spot",
        lambda: cloud.check_checkpoints(sky.spot, trainer.checkpoint_every_minutes, trainer.checkpoint_every_steps),
    )


def _script(config: Config) -> str:
    config = identified(config)
    with contextlib.suppress(ConfigError):  # another run has that name: a finding of the directory's
        config = agreed(config)
    return render(slurm_job([config]))


def _job(p: _Patient) -> Iterator[Finding]:
    try:
        script = p.script or _script(p.config)
    except ConfigError as error:
        yield of_message("job", error)
        return
    yield from slurm.check_job(script, p.scratch)


def _elsewhere(config: Config) -> bool:
    """Whether the run is on other machines, or in a container that has an environment of its own."""
    return config.cluster.launcher != "local"


def _by_slurm(config: Config) -> bool:
    return config.cluster.launcher == "slurm"


def _model(p: _Patient) -> Iterator[Finding]:
    """Built without memory, so that its name and its sizes are known."""
    try:
        check_name(p.config.model.name)
        with torch.device("meta"):
            p.model = build_model(completed(p.config, data={"num_classes": p.classes or 1000}))
    except (ConfigError, ValueError) as error:
        yield of_message("model", error)
        return
    parameters = sum(parameter.numel() for parameter in p.model.parameters())
    yield ok("model", f"{p.config.model.name}, {parameters:,} parameters")


def _weights(p: _Patient) -> Iterator[Finding]:
    """Whether a run can begin from model.init, by doing so."""
    config = p.config
    if config.run.id and checkpoints(config.directory / "checkpoints"):
        yield ok("weights", "the run has a checkpoint, and needs the file of model.init no more")
        return
    try:
        config = with_digest(completed(config, data={"num_classes": p.classes or 1000}))
        yield ok("weights", initialize(build_model(config), config).line(config))
    except (ConfigError, ValueError) as error:
        yield of_message("weights", error)


def _sizes(p: _Patient) -> Iterator[Finding]:
    """Whether the network takes images as small as those that it begins with."""
    assert p.model is not None
    growth, full = build_augmentation(p.config).growth, p.config.data.image_size
    assert growth is not None
    try:
        check_sizes(p.config, p.model)
    except ConfigError as error:
        yield of_message("sizes", error)
        return
    yield ok("sizes", f"images of {', '.join(map(str, growth.sizes(full)))} pixels a side, one after the other")


def _change(p: _Patient) -> str:
    """In what the data set differs from the one that the run's directory names."""
    assert p.dataset is not None
    known = p.config.run.id and (p.config.directory / MANIFEST).is_file()
    return difference(read_manifest(p.config.directory), p.dataset.manifest) if known else "its digest differs"


def _images(dataset: Dataset, splits: list[Split]) -> Iterator[Finding]:
    if dataset.location.is_remote:
        yield from packed.check_images(splits, packed.remote_reader(dataset.location.root), most=REMOTE_IMAGES)
        return
    here = replace(dataset, cache=None)  # where they lie: nothing is staged for a look
    streams = {split.name: ShardStream(here, split, keep=16) for split in splits}

    def read(split: Split, sample: int) -> None:
        streams[split.name].read(sample)

    yield from packed.check_images(splits, read)


def _tracking(config: Config) -> Iterator[Finding]:
    tracking, known = config.tracking, "doctor"
    if config.run.id and (config.directory / RECORD).exists():
        with contextlib.suppress(ConfigError):  # a finding of the directory's
            known = read_record(config.directory).wandb_id
    place = WandbPlace(
        id=known, name=config.run.id, project=tracking.project, entity=tracking.entity, group=None, tags=[]
    )
    yield from check_tracking(
        tracking.mode, wandb_mode("auto") == "online", lambda: last_position_on_server(place, seconds=SERVER_SECONDS)
    )


def _written(place: Path) -> float:
    """When the file system of a directory says that a file was written just now."""
    try:
        with tempfile.NamedTemporaryFile(prefix=".doctor-", dir=machine.existing(place)) as file:
            return Path(file.name).stat().st_mtime
    except OSError:
        return time.time()  # that it cannot be written is a finding of its own


def _pace(p: _Patient) -> Iterator[Finding]:
    c, device = p.config, "cuda" if p.cuda else "cpu"
    threads = torch.get_num_threads()
    torch.set_num_threads(p.threads)
    try:
        classifier = Classifier(
            build_model(completed(c, data={"num_classes": p.classes})), prepare=Preparation(c.data.mean, c.data.std),
            loss=Loss(c.loss.label_smoothing, c.loss.auxiliary_weight), schedule=build_schedule(c, images=p.images),
            descent=build_descent(c), world=1, pieces=1,
        )  # fmt: skip
        if c.trainer.precision == "64":
            classifier.double()
        step = pace.stepper(
            classifier,
            image_size=c.data.image_size,
            classes=p.classes,
            device=device,
            bf16=c.trainer.precision == "bf16",
        )
        measured = pace.measured(step, max(1, *p.cut.sizes(0)), PACE_SECONDS)
    finally:
        torch.set_num_threads(threads)
    batch, load, cores = c.data.global_batch_size, os.getloadavg()[0], machine.available_cores()
    yield from pace.check_pace(
        measured, images=p.images, batch=batch, world=c.world, device=device,
        steps=arithmetic.total_steps(batch, p.images, c.trainer.max_epochs, c.trainer.max_steps),
        grows=c.augment.first_size < 1,
        busy=f" (busy otherwise: load {load:.1f} on {cores:g} cores)" if load > cores else "",
    )  # fmt: skip
