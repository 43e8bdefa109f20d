"""Data, model, norm, optimizer and Trainer of a run, built from its config."""

from __future__ import annotations

import copy
import logging
import math
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from pipeline import models
from pipeline.config import Config, ConfigError, completed, identity, statistics_group
from pipeline.data.augment import Augmentation, CentreCrop, Growth, Preparation
from pipeline.data.batch import micro_batches
from pipeline.data.datamodule import ImageData
from pipeline.data.dataset import Location, open_dataset
from pipeline.data.decode import DECODER, REGIONS
from pipeline.data.loader import Batching
from pipeline.data.mixing import Mixing, blended
from pipeline.data.policy import Policy
from pipeline.data.shards import DataError
from pipeline.launch.environment import LaunchedEnvironment
from pipeline.launch.plan import worker_count
from pipeline.models.registry import DENSE, MODELS
from pipeline.norm import PerActivationNorm, SyncBatchNorm, convert, freeze, revert
from pipeline.training.averaging import Averaging
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.checkpoint_io import CheckpointFiles
from pipeline.training.classifier import Classifier
from pipeline.training.loss import Loss
from pipeline.training.operations import operations_per_image
from pipeline.training.optimizer import Descent
from pipeline.training.schedule import Schedule
from pipeline.world import World

_LOG = logging.getLogger(__name__)
_NEVER = 2**31
PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "64": "64-true"}


@dataclass(frozen=True, slots=True)
class Assembly:
    """Everything a process trains or evaluates with."""

    config: Config
    world: World
    data: ImageData
    classifier: Classifier
    checkpoints: Checkpoints

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        limits = [self.config.trainer.max_steps, self.config.trainer.max_epochs * self.data.train_loader.steps]
        return min(limit for limit in limits if limit >= 0)


def assemble(config: Config, world: World) -> Assembly:
    """Build a run's parts for one process. The initial weights depend on the seed alone."""
    threads = config.trainer.threads or 1
    torch.set_num_threads(threads)
    # Without it Lightning gives each rank its share of the machine's cores when it begins (2.6), against the config.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    lightning.seed_everything(config.seed, verbose=False)
    data = build_data(config, world)
    if data.train_loader.read_ahead is not None and world.local_rank == 0:  # once a node; the leading rank's goes to
        data.train_loader.read_ahead.warn = partial(_LOG.warning, "node %d: %s", world.node)  # its console
    model = build_model(config, ranks=world.size)
    check_sizes(config, model)
    classifier = Classifier(
        model,
        prepare=Preparation(config.data.mean, config.data.std),
        loss=Loss(config.loss.label_smoothing, config.loss.auxiliary_weight),
        schedule=build_schedule(config, images=len(data.train_loader.images.split)),
        descent=build_descent(config),
        world=world.size,
        pieces=data.batching.pieces,
        mix=blended if config.augment.mixup or config.augment.cutmix else None,
        averaging=build_averaging(config, images=len(data.train_loader.images.split)),
    )
    checkpoints = Checkpoints(
        config.directory / "checkpoints",
        CheckpointFiles(identity(config)),
        every_steps=config.trainer.checkpoint_every_steps,
        every_minutes=config.trainer.checkpoint_every_minutes,
        keep=config.trainer.keep_checkpoints,
    )
    if config.trainer.precision == "64":
        classifier.double()  # before a checkpoint is loaded: Lightning would copy its float64 into float32 first
    return Assembly(config, world, data, classifier, checkpoints)


def build_data(config: Config, world: World) -> ImageData:
    location = Location(*config.data.location)
    if location.is_cached and location.unset_variables:
        raise ConfigError(location.unset_variables)
    dataset = open_dataset(location, workers=config.trainer.threads or 1, say=lambda text: None)
    if config.data.digest not in ("", dataset.manifest.digest):
        raise DataError(
            f"data.root = {config.data.root} holds another data set here than where the run was started; copy that one"
        )
    decoder = config.data.decoder
    if decoder == REGIONS != DECODER:
        raise ConfigError(
            "data.decoder = regions, which is not installed here (python: pipeline.data.jpeg_region): install gcc, "
            "python3-dev and libjpeg62-turbo-dev and then pipeline again, or start a new run with data.decoder=whole"
        )
    return ImageData(
        dataset,
        num_classes=config.data.num_classes,
        augment=build_augmentation(config),
        crop=CentreCrop(config.data.image_size, config.data.evaluation_crop, decoder),
        batching=Batching(
            global_batch_size=config.data.global_batch_size,
            micro_batch_size=config.data.micro_batch_size,
            world=world.size,
            rank=world.rank,
            seed=config.seed,
            window=config.data.window,
            workers=worker_count(config, cuda=accelerator_of(config) == "cuda"),
        ),
    )


def build_augmentation(config: Config) -> Augmentation:
    a = config.augment
    return Augmentation(
        config.data.image_size,
        a.area_min,
        a.flip,
        a.photometric,
        config.data.decoder,
        policy=Policy(a.operations, a.magnitude, a.magnitude_spread) if a.operations else None,
        mixing=Mixing(a.mixup, a.cutmix) if a.mixup or a.cutmix else None,
        growth=Growth(a.first_size, a.growth_steps, a.growth_epochs) if a.first_size < 1 else None,
    )


def build_model(config: Config, *, ranks: int = 0) -> torch.nn.Module:
    """The network with its norms, frozen ones in evaluation mode for good. ranks: 0 = the config's."""
    network = _build_network(config, statistics_group(config, ranks or config.world))
    if config.norm.frozen:
        freeze(network, config.norm.frozen)
    return network


def _build_network(config: Config, group_size: int | str) -> torch.nn.Module:
    """Our networks are handed a factory of norms, torchvision's are converted."""
    model, norm, options = config.model, config.norm, model_options(config)
    if model.name in MODELS:
        how: dict[str, Any] = {"group_size": group_size, "momentum": norm.momentum, "eps": norm.eps}
        if model.name not in DENSE:
            options["place_norm"] = partial(PerActivationNorm, **how)
        factory = partial(SyncBatchNorm, **how)
        return models.build(model.name, num_classes=config.data.num_classes, norm=factory, **options)
    try:
        network = models.build(model.name, num_classes=config.data.num_classes, **options)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return convert(network, group_size=group_size)


def model_options(config: Config) -> dict[str, Any]:
    """What `models.build` is given of the network beside its name, its classes and its norm."""
    model = config.model
    options: dict[str, Any] = {} if model.dropout is None else {"dropout": model.dropout}
    if model.zero_gamma:
        options["zero_gamma"] = True
    if model.name not in MODELS:
        return options
    options |= {"activation": model.activation, "initial_gain": model.initial_gain}
    return options | ({"image_size": config.data.image_size} if model.name in DENSE else {
        "width": model.width, "stem": model.stem, "response_norm": model.response_norm,
        "auxiliary_head": model.auxiliary_head, "literal_fig5": model.literal_fig5,
        "count_padding": model.count_padding, "per_activation": model.per_activation,
        "image_size": config.data.image_size,
    })  # fmt: skip


def check_sizes(config: Config, model: torch.nn.Module) -> None:
    """Raises ConfigError where images that grow begin too small for a network, or it takes one size alone."""
    growth, full = build_augmentation(config).growth, config.data.image_size
    if growth is None:
        return
    plain = revert(copy.deepcopy(model))  # those of torchvision are not known to any rule
    for size in growth.sizes(full)[:-1]:
        if not operations_per_image(plain, size):
            raise ConfigError(f"augment.first_size = {growth.first}: {config.model.name} takes no images of {size} "
                              f"pixels a side; begin larger, or set it to 1 for {full} from the first epoch on"
                              )  # fmt: skip


def build_schedule(config: Config, *, images: int) -> Schedule:
    return Schedule(
        rate=config.optimizer.rate,
        rate_batch_size=config.optimizer.rate_batch_size,
        global_batch_size=config.data.global_batch_size,
        images=images,
        decay_factor=config.schedule.decay_factor,
        decay_epochs=config.schedule.decay_epochs,
        warmup_epochs=config.schedule.warmup_epochs,
        warmup_factor=config.schedule.warmup_factor,
        form=config.schedule.form,
        epochs=config.schedule.epochs or config.trainer.max_epochs,
        power=config.schedule.power,
        final_factor=config.schedule.final_factor,
    )


def build_averaging(config: Config, *, images: int) -> Averaging | None:
    a = config.averaging
    start_step = math.ceil(a.start_epochs * images / config.data.global_batch_size)
    return Averaging(a.decay, a.every_steps, start_step) if a.decay else None


def build_descent(config: Config) -> Descent:
    o = config.optimizer
    return Descent(o.name, o.momentum, o.weight_decay, o.nesterov, o.trust_coefficient, o.trust_clip, o.second_momentum)


def build_trainer(assembly: Assembly, callbacks: list[lightning.Callback]) -> lightning.Trainer:
    config, world = assembly.config, assembly.world
    if config.trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Advice about a worker count, a missing logger or a loader that Lightning cannot inspect does not apply to ours.
    warnings.filterwarnings("ignore", module="lightning")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    trainer = config.trainer
    built = lightning.Trainer(
        accelerator=accelerator_of(config),
        # The strategy names the devices; Lightning would look for one of its own for each rank that shares one.
        devices=1 if accelerator_of(config) == "cuda" else world.local_size,
        num_nodes=config.cluster.nodes,
        strategy=build_strategy(config, world, assembly.checkpoints.files),
        plugins=[LaunchedEnvironment(world)] if world.size == 1 else None,  # else Lightning looks for Slurm by itself
        precision=PRECISIONS[trainer.precision],  # type: ignore[arg-type]
        max_epochs=trainer.max_epochs,
        max_steps=trainer.max_steps,
        accumulate_grad_batches=assembly.data.batching.pieces,
        check_val_every_n_epoch=trainer.validate_every_epochs or _NEVER,
        deterministic=trainer.deterministic,
        callbacks=callbacks,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        inference_mode=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Its handler of SIGTERM communicates: a signal that met one rank first would leave the ranks waiting in
    # collectives that do not meet.
    built._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]
    return built


def _nothing() -> None:
    """No handlers."""


def build_strategy(config: Config, world: World, files: CheckpointFiles) -> Strategy:
    cuda = accelerator_of(config) == "cuda"
    device = torch.device("cuda", world.local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if world.size == 1:
        return SingleDeviceStrategy(device, checkpoint_io=files)
    one_device_each = cuda and world.local_size <= torch.cuda.device_count()
    return DDPStrategy(
        parallel_devices=[torch.device("cuda", i % torch.cuda.device_count()) if cuda else torch.device("cpu")
                          for i in range(world.local_size)],
        cluster_environment=LaunchedEnvironment(world),
        checkpoint_io=files,
        process_group_backend="nccl" if one_device_each else "gloo",  # NCCL refuses two ranks on one device
        timeout=timedelta(minutes=config.cluster.timeout_minutes),
        broadcast_buffers=False,  # batch statistics never travel: each rank computes them, groups have their own
        gradient_as_bucket_view=True,
    )  # fmt: skip


def evaluated_by(config: Config, world: World) -> Config:
    """The config with micro-batches that hold as many images as shared statistics in training, by all ranks there are.

    A run on many ranks is evaluated on few, which would hold a large batch at once, and estimate by it.
    """
    if not config.norm.group_images:
        return config
    together = -(-min(config.norm.group_images, config.data.global_batch_size) // world.size)
    return completed(config, norm={"group_images": 0}, data={"micro_batch_size": together})


def micro_batch_images(config: Config, world: int) -> int:
    """Images, over all ranks, whose statistics are taken together."""
    pieces = micro_batches(config.data.global_batch_size, world, config.data.micro_batch_size)
    return -(-config.data.global_batch_size // pieces)


def device_name(config: Config) -> str:
    return torch.cuda.get_device_name() if accelerator_of(config) == "cuda" else "cpu"


def accelerator_of(config: Config) -> str:
    if config.cluster.accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if config.cluster.accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError("cluster.accelerator = 'cuda', but torch finds no CUDA device; use auto or cpu")
    return config.cluster.accelerator
