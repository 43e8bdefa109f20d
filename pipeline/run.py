"""READ THIS FIRST: assembles data, model, norm, optimizer, callbacks and Trainer from a config, and runs them.

`train` and `evaluate` are what every process of a run executes; the world says which one it is.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pipeline import models
from pipeline.callbacks.bad_samples import BadSamples
from pipeline.callbacks.journal import Journal
from pipeline.callbacks.ledger import Ledger
from pipeline.callbacks.losses import Losses
from pipeline.callbacks.population import Population
from pipeline.callbacks.preemption import InterruptedRunError, Preemption
from pipeline.callbacks.progress import ProgressReport
from pipeline.callbacks.throughput import Throughput
from pipeline.callbacks.tracking import Reporter, Tracking
from pipeline.callbacks.wandb_reporter import TrackingError, WandbPlace, WandbReporter
from pipeline.callbacks.watchdog import Watchdog, connection_broke, note_traceback
from pipeline.config import Config, ConfigError, completed, identity, read_config
from pipeline.data.augment import Augmentation, CentreCrop, Preparation
from pipeline.data.batch import micro_batches
from pipeline.data.datamodule import ImageData
from pipeline.data.dataset import Location, open_dataset
from pipeline.data.decode import DECODER, REGIONS
from pipeline.data.loader import Batching
from pipeline.data.order import SORTED, WELL_MIXED, Order, shard_mixing, shuffle_quality
from pipeline.data.shards import DataError
from pipeline.evaluation.metrics import Scores
from pipeline.launch.environment import LaunchedEnvironment
from pipeline.launch.failure import FailedRunError
from pipeline.launch.plan import note_start, read_record
from pipeline.launch.pulse import Pulse, pulse_path
from pipeline.models.registry import MODELS
from pipeline.norm import SyncBatchNorm, convert
from pipeline.training.checkpoint import Checkpoints, checkpoints, clear, newest, set_aside
from pipeline.training.checkpoint_io import CheckpointFiles
from pipeline.training.classifier import Classifier
from pipeline.training.loss import Loss
from pipeline.training.schedule import Schedule
from pipeline.training.shortage import Appetite, shortage
from pipeline.world import World

_NEVER = 2**31
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EPERM, errno.EACCES, errno.ESTALE, errno.EIO, errno.EFBIG)
PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "64": "64-true"}


@dataclass(frozen=True, slots=True)
class Assembly:
    """Everything a process trains or evaluates with."""

    config: Config
    world: World
    data: ImageData
    classifier: Classifier
    throughput: Throughput
    checkpoints: Checkpoints

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        limits = [self.config.trainer.max_steps, self.config.trainer.max_epochs * self.data.train_loader.steps]
        return min(limit for limit in limits if limit >= 0)


def assemble(config: Config, world: World) -> Assembly:
    """Build a run's parts for one process. The initial weights depend on the seed alone."""
    torch.set_num_threads(config.trainer.threads or 1)
    lightning.seed_everything(config.seed, verbose=False)
    data = build_data(config, world)
    classifier = Classifier(
        build_model(config),
        prepare=Preparation(config.data.mean, config.data.std),
        loss=Loss(config.loss.label_smoothing, config.loss.auxiliary_weight),
        schedule=build_schedule(config, images=len(data.train_loader.images.split)),
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
        world=world.size,
        pieces=data.batching.pieces,
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
    return Assembly(config, world, data, classifier, Throughput(config.data.global_batch_size), checkpoints)


def build_data(config: Config, world: World) -> ImageData:
    dataset = open_dataset(Location(*config.data.location), workers=config.trainer.threads or 1, say=lambda text: None)
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
        augment=Augmentation(
            config.data.image_size, config.augment.area_min, config.augment.flip, config.augment.photometric, decoder
        ),
        crop=CentreCrop(config.data.image_size, config.data.evaluation_crop, decoder),
        batching=Batching(
            global_batch_size=config.data.global_batch_size,
            micro_batch_size=config.data.micro_batch_size,
            world=world.size,
            rank=world.rank,
            seed=config.seed,
            window=config.data.window,
            workers=_workers(config),
        ),
    )


def build_model(config: Config) -> torch.nn.Module:
    """The network with its norms: ours are handed a factory, torchvision's are converted."""
    model, norm = config.model, config.norm
    options: dict[str, Any] = {} if model.dropout is None else {"dropout": model.dropout}
    if model.name in MODELS:
        factory = partial(SyncBatchNorm, group_size=norm.group_size, momentum=norm.momentum, eps=norm.eps)
        return models.build(
            model.name, num_classes=config.data.num_classes, norm=factory, width=model.width, stem=model.stem,
            activation=model.activation, response_norm=model.response_norm, auxiliary_head=model.auxiliary_head,
            literal_fig5=model.literal_fig5, initial_gain=model.initial_gain, **options,
        )  # fmt: skip
    try:
        network = models.build(model.name, num_classes=config.data.num_classes, **options)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return convert(network, group_size=norm.group_size)


def build_schedule(config: Config, *, images: int) -> Schedule:
    return Schedule(
        rate=config.optimizer.rate,
        rate_batch_size=config.optimizer.rate_batch_size,
        global_batch_size=config.data.global_batch_size,
        images=images,
        decay_factor=config.schedule.decay_factor,
        decay_epochs=config.schedule.decay_epochs,
        warmup_epochs=config.schedule.warmup_epochs,
    )


def build_trainer(assembly: Assembly, callbacks: list[lightning.Callback]) -> lightning.Trainer:
    config, world = assembly.config, assembly.world
    if config.trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Advice about a worker count, a missing logger or a loader that Lightning cannot inspect does not apply to ours.
    warnings.filterwarnings("ignore", module="lightning")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    trainer = config.trainer
    return lightning.Trainer(
        accelerator=_accelerator(config),
        # The strategy names the devices; Lightning would look for one of its own for each rank that shares one.
        devices=1 if _accelerator(config) == "cuda" else world.local_size,
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


def build_strategy(config: Config, world: World, files: CheckpointFiles) -> Strategy:
    cuda = _accelerator(config) == "cuda"
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
        # DDP sums its first step in one bucket and lays the buckets out anew for the second, so that the first step
        # after a resume would add up in another order than the same step of an uninterrupted run: other bits from
        # three ranks on (tests/multiprocess/test_resume.py). Looking for unused parameters keeps the first layout.
        find_unused_parameters=config.trainer.deterministic,
    )  # fmt: skip


def go_on(
    directory: Path,
    world: World,
    console: Console,
    overrides: Sequence[str] = (),
    watchers: Sequence[lightning.Callback] = (),
) -> Scores | None:
    """Train the run whose frozen config lies in a directory, wherever that was moved. Raises as `train` does."""
    config = read_config(directory / "config.yaml", overrides)
    config = completed(config, run={"dir": str(directory.parent), "id": directory.name})
    return train(config, world, console, watchers)


def train(config: Config, world: World, console: Console, watchers: Sequence[lightning.Callback] = ()) -> Scores | None:
    """Train to the end, from the newest checkpoint if there is one. Raises InterruptedRun-, FailedRun-, DataError.

    watchers: callbacks after the run's own.
    """
    run = assemble(config, world)
    record = read_record(config.directory)
    say = partial(console.print, highlight=False, soft_wrap=True)
    run.checkpoints.say = say
    start, faults = newest(run.checkpoints.directory, identity(config))
    progress = ProgressReport(console, steps=run.steps)
    reporters: list[Reporter] = []
    if world.leads:
        clear(run.checkpoints.directory)
        for path, fault in faults.items():
            say(f"WARNING: {path} is passed over, and now called {set_aside(path).name}: {fault}")
        _announce(run, start, console)
        facts = {"torch": torch.__version__, "device": _device_name(config)}
        for change in note_start(config.directory, **facts):
            say(f"WARNING: {change}: samples and their order stay, the bits may not")
        try:
            reporters = _reporters(run, start, progress, record.wandb_id, console)
        except TrackingError as error:
            raise ConfigError(f"tracking.mode = {config.tracking.mode}: {error}") from None
    tracking = Tracking(
        run.throughput,
        every_steps=config.tracking.every_steps,
        global_batch_size=config.data.global_batch_size,
        images=run.classifier.schedule.images,
        reporters=reporters,
    )
    watchdog, losses = _watchdog(run, console), _losses(run)

    def before_a_save(trainer: lightning.Trainer) -> None:
        watchdog.pulse.move("checkpoint")
        losses.check(trainer)

    run.checkpoints.before = before_a_save
    population = Population(
        run.data.train_loader, config.norm.precise_images, on_batch=partial(watchdog.pulse.move, "statistics")
    )
    callbacks = [run.throughput, population, tracking]
    callbacks += [progress] if world.leads else []
    if config.ledger:
        callbacks.append(Ledger(config.directory / "ledger", rank=world.rank, keys=run.data.keys))
    bad_samples = BadSamples(
        config.directory / "bad-samples", run.data, budget=config.data.bad_samples, rank=world.rank, console=console
    )
    preemption = Preemption(
        run.checkpoints,
        bad_samples,
        losses,
        timeout=timedelta(minutes=config.cluster.timeout_minutes),
        on_interruption=partial(_tell_of_interruption, reporters),
    )
    callbacks += [bad_samples, losses, run.checkpoints, preemption, watchdog, *watchers]
    trainer = build_trainer(run, callbacks)
    try:
        with interruptible(), explained(run, watchdog):
            trainer.fit(run.classifier, datamodule=run.data, ckpt_path=start, weights_only=True)
            if tracking.validated_step != trainer.global_step:
                trainer.validate(run.classifier, datamodule=run.data, verbose=False)
                run.checkpoints.keep_best(trainer, run.classifier.scores)
            run.checkpoints.finish()
    except MisconfigurationException as error:
        raise ConfigError(f"{start}: {str(error).splitlines()[0]}") from None
    finally:
        for reporter in reporters:
            reporter.close()
    if world.leads:
        _summarize(run, trainer.global_step, console)
    return run.classifier.scores


def _watchdog(run: Assembly, console: Console) -> Watchdog:
    config, world = run.config, run.world
    return Watchdog(
        Pulse(pulse_path(world.rank)),
        rank=world.rank,
        world=world.size,
        host=socket.gethostname(),
        hang_seconds=config.cluster.hang_seconds,
        first_seconds=max(config.cluster.timeout_minutes * 60 / 2, config.cluster.hang_seconds),
        logs=config.directory / "logs",
        name=run.data.names,
        hint=f"go on with: pipeline train {config.directory}/config.yaml",
        say=partial(console.print, highlight=False, soft_wrap=True),
    )


def _losses(run: Assembly) -> Losses:
    config, world = run.config, run.world
    return Losses(
        config.directory,
        rank=world.rank,
        world=world.size,
        host=socket.gethostname(),
        on_nan=config.trainer.on_nan,
        spike_factor=config.trainer.spike_factor,
        steps=run.data.train_loader.steps,
        pieces=run.data.batching.pieces,
        name=run.data.names,
    )


@contextmanager
def explained(run: Assembly, watchdog: Watchdog) -> Iterator[None]:
    """Watch what runs inside, and say of its failures what they are. Raises FailedRunError for those it knows."""
    config, logs = run.config, run.config.directory / "logs"
    failed = False  # of itself, so that the others may not know
    try:
        yield
    except Exception as error:
        failed = True
        if type(error).__module__.startswith("pipeline"):  # it says itself what it is
            failed = not isinstance(error, InterruptedRunError | FailedRunError)
            raise
        who = f"rank {run.world.rank} of {run.world.size} on {socket.gethostname()}"
        unwritable = _unwritable(error, config.directory)
        if unwritable:
            raise FailedRunError(f"{who}: {unwritable}") from None
        said = shortage(error, _appetite(config, run.world))
        if not said and not connection_broke(error):
            raise
        log = note_traceback(logs, run.world.rank, error)
        if said:
            raise FailedRunError(f"{who}: {said} (all of it in {log})") from None
        failed = False
        raise watchdog.lost(error) from None
    finally:
        watchdog.stop(failed=failed)


def _unwritable(error: Exception, directory: Path) -> str:
    """What to say of a file of the run that cannot be written, or ""."""
    if not isinstance(error, OSError) or error.errno not in _UNWRITABLE:
        return ""
    saved = checkpoints(directory / "checkpoints")
    last = f"{saved[-1].name} is the newest checkpoint" if saved else "there is no checkpoint yet"
    return (
        f"{error.filename or f'a file in {directory}'} cannot be written ({error.strerror}); {last}; make room, or the "
        f"directory writable, and go on with: pipeline train {directory}/config.yaml"
    )


def _appetite(config: Config, world: World) -> Appetite:
    return Appetite(
        images=-(-micro_batch_images(config, world.size) // world.size),
        image_size=config.data.image_size,
        width=config.model.width,
        precision=config.trainer.precision,
        workers=_workers(config),
    )


def _tell_of_interruption(reporters: list[Reporter]) -> None:
    for reporter in reporters:
        reporter.interrupted()


def evaluate(config: Config, world: World, console: Console, *, checkpoint: Path) -> Scores:
    """Scores of a checkpoint on the validation images, each counted once, with population statistics."""
    run = assemble(config, world)
    state = load_weights(run.classifier, checkpoint)
    population = Population(run.data.train_loader, config.norm.precise_images)
    bad_samples = BadSamples(
        config.directory / "bad-samples", run.data, budget=config.data.bad_samples, rank=world.rank, console=console
    )
    trainer = build_trainer(run, [population, bad_samples])
    with interruptible():
        trainer.validate(run.classifier, datamodule=run.data, verbose=False)
    scores = run.classifier.scores
    assert scores is not None
    if world.leads:
        result = {"checkpoint": checkpoint.name, "step": state["global_step"], **asdict(scores)}
        (config.directory / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
        console.print(_table(f"evaluation of {config.run.id}", {
            "checkpoint": f"{checkpoint.name} (step {state['global_step']})",
            "images": f"{scores.images:,}", "top-1": f"{scores.top1:.2%}", "top-5": f"{scores.top5:.2%}",
            "loss": f"{scores.loss:.4f}", "statistics": _statistics(config),
        }))  # fmt: skip
    return scores


def load_weights(classifier: Classifier, checkpoint: Path) -> dict[str, Any]:
    """Load a checkpoint's weights; returns all of it. Raises DataError or, if it does not fit, ConfigError."""
    try:
        state: dict[str, Any] = CheckpointFiles().load_checkpoint(checkpoint)
        weights = state["state_dict"]
    except Exception:  # torch and its unpickler have many ways to say so
        raise DataError(f"{checkpoint} is no whole checkpoint of a run; give another with --checkpoint") from None
    try:
        classifier.load_state_dict(weights)
    except RuntimeError:
        raise ConfigError(
            f"{checkpoint} does not fit the model of this config; leave model.* as the run has it"
        ) from None
    return state


@contextmanager
def interruptible() -> Iterator[None]:
    """Take what Lightning makes of a signal outside the training loop, as the interruption that it is."""
    try:
        yield
    except SystemExit as ending:
        if isinstance(ending, SIGTERMException) or isinstance(ending.__context__, KeyboardInterrupt):
            raise InterruptedRunError("interrupted") from None
        raise


def _workers(config: Config) -> int:
    if config.cluster.workers >= 0:
        return config.cluster.workers
    # On CPU the training takes every core. With a GPU a core is left to the process that feeds it.
    return max(1, (os.cpu_count() or 1) // config.cluster.devices - 1) if _accelerator(config) == "cuda" else 0


def _device_name(config: Config) -> str:
    return torch.cuda.get_device_name() if _accelerator(config) == "cuda" else "cpu"


def _accelerator(config: Config) -> str:
    if config.cluster.accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if config.cluster.accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError("cluster.accelerator = 'cuda', but torch finds no CUDA device; use auto or cpu")
    return config.cluster.accelerator


def _reporters(
    run: Assembly, start: Path | None, progress: ProgressReport, wandb_id: str, console: Console
) -> list[Reporter]:
    config = run.config
    step = int(start.stem.partition("-")[2]) if start else 0
    path = config.directory / "metrics.csv"
    reporters: list[Reporter] = [progress, Journal(path, from_step=step)]
    if config.tracking.mode != "disabled":
        place = WandbPlace(
            id=wandb_id, name=config.run.id, project=config.tracking.project, entity=config.tracking.entity,
            group=config.tracking.group, tags=config.tracking.tags,
        )  # fmt: skip
        say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
        tracker = WandbReporter(place, directory=config.directory, mode=config.tracking.mode, config=asdict(config),
                                journal=path, say=say)  # fmt: skip
        where = f"  upload with: pipeline sync {config.directory}" if "offline" in tracker.mode else ""
        say(f"W&B {tracker.mode}, run {wandb_id}{where}")
        reporters.append(tracker)
    return reporters


def _announce(run: Assembly, start: Path | None, console: Console) -> None:
    config, loader = run.config, run.data.train_loader
    pieces = run.data.batching.pieces
    parameters = sum(p.numel() for p in run.classifier.model.parameters())
    console.print(
        f"{config.run.id}: {config.model.name}, {parameters:,} parameters, {run.world.size} "
        f"{'process' if run.world.size == 1 else 'processes'}; {run.steps:,} steps of {config.data.global_batch_size} "
        f"images, rate {run.classifier.schedule.scaled_rate:g}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if loader.dropped:
        console.print(f"each epoch leaves out {loader.dropped} of {len(loader.images.split):,} images (another "
                      "selection each time), so that every step is a whole global batch",
                      highlight=False, soft_wrap=True)  # fmt: skip
    order, label_S = loader.shares.order, loader.images.split.label_S
    if order.window < len(order.counts):
        console.print(_mixing(order, label_S, config.data.global_batch_size), highlight=False, soft_wrap=True)
    if pieces > 1:
        micro = micro_batch_images(config, run.world.size)
        console.print(f"gradients accumulate over {pieces} micro-batches a step; batch statistics are those of a "
                      f"micro-batch, {micro} images over all ranks", highlight=False, soft_wrap=True)  # fmt: skip
    if start:
        console.print(f"going on from {start}", highlight=False, soft_wrap=True)
    for line in run.data.dataset.streaming(config.data.window):
        console.print(line, highlight=False, soft_wrap=True)
    if loader.read_ahead is not None:
        loader.read_ahead.say = partial(console.print, highlight=False, soft_wrap=True)


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


def micro_batch_images(config: Config, world: int) -> int:
    """Images, over all ranks, whose statistics are taken together."""
    pieces = micro_batches(config.data.global_batch_size, world, config.data.micro_batch_size)
    return -(-config.data.global_batch_size // pieces)


def _summarize(run: Assembly, steps: int, console: Console) -> None:
    config, scores = run.config, run.classifier.scores
    elapsed = run.throughput.elapsed()
    facts = {"steps": f"{steps:,}", "time": f"{elapsed / 60:.1f} min"}
    if scores is not None:
        facts |= {"validation top-1": f"{scores.top1:.2%}", "validation top-5": f"{scores.top5:.2%}",
                  "validation loss": f"{scores.loss:.4f}", "images": f"{scores.images:,}",
                  "statistics": _statistics(config)}  # fmt: skip
    facts["run directory"] = str(config.directory)
    console.print(_table(config.run.id, facts))


def _statistics(config: Config) -> str:
    images = config.norm.precise_images
    return f"population, {images:,} training images at most" if images else "running averages"


def _table(title: str, facts: dict[str, Any]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table
