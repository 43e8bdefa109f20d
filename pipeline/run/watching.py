"""What watches a run, built from its config: watchdog, losses, reporters."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import lightning
from rich.console import Console

from pipeline.callbacks.bad_samples import BadSamples
from pipeline.callbacks.gradient_layout import GradientLayout
from pipeline.callbacks.journal import Journal
from pipeline.callbacks.ledger import Ledger
from pipeline.callbacks.losses import Losses
from pipeline.callbacks.population import Population
from pipeline.callbacks.preemption import Preemption, SameStart
from pipeline.callbacks.progress import ProgressReport
from pipeline.callbacks.sweep import Heartbeat
from pipeline.callbacks.tracking import Reporter, Tracking
from pipeline.callbacks.wandb_reporter import TrackingError, WandbPlace, WandbReporter
from pipeline.callbacks.watchdog import Watchdog
from pipeline.config import ConfigError
from pipeline.launch.plan import STOPPED, read_record
from pipeline.launch.pulse import Pulse, pulse_path
from pipeline.run.assembly import Assembly


@dataclass(frozen=True, slots=True)
class Watch:
    """All callbacks of a training in the order in which Lightning calls them, and those that `train` asks."""

    callbacks: list[lightning.Callback]
    tracking: Tracking
    watchdog: Watchdog


def build_watch(run: Assembly, reporters: Sequence[Reporter], console: Console) -> Watch:
    config, world = run.config, run.world
    tracking = Tracking(
        run.throughput,
        every_steps=config.tracking.every_steps,
        global_batch_size=config.data.global_batch_size,
        images=run.classifier.schedule.images,
        reporters=reporters,
    )
    watchdog, losses = build_watchdog(run, console), build_losses(run)

    def before_a_save(trainer: lightning.Trainer) -> None:
        watchdog.pulse.move("checkpoint")
        losses.check(trainer)

    run.checkpoints.before = before_a_save
    population = Population(
        run.data.train_loader,
        config.norm.precise_images,
        form=config.norm.precise_form,
        on_batch=partial(watchdog.pulse.move, "statistics"),
    )
    bad_samples = BadSamples(
        config.directory / "bad-samples", run.data, budget=config.data.bad_samples, rank=world.rank, console=console
    )
    preemption = Preemption(
        run.checkpoints,
        bad_samples,
        losses,
        is_done=lambda trainer: tracking.validated_step == trainer.global_step,
        on_interruption=partial(_tell_of_interruption, reporters, config.directory),
    )
    same_start = SameStart(losses.agreement, timedelta(minutes=config.cluster.timeout_minutes))
    layout = GradientLayout(config.data.image_size)
    callbacks: list[lightning.Callback] = [same_start, layout, run.throughput, population, tracking]
    callbacks += [reporter for reporter in reporters if isinstance(reporter, ProgressReport)]
    if config.ledger:
        callbacks.append(Ledger(config.directory / "ledger", rank=world.rank, keys=run.data.keys))
    callbacks += [bad_samples, losses, run.checkpoints, preemption, watchdog]
    return Watch(callbacks, tracking, watchdog)


def build_watchdog(run: Assembly, console: Console) -> Watchdog:
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
        hint=f"go on with: {config.way_on}",
        say=partial(console.print, highlight=False, soft_wrap=True),
    )


def build_losses(run: Assembly) -> Losses:
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


def build_reporters(run: Assembly, start: Path | None, console: Console) -> list[Reporter]:
    """Terminal, metrics.csv and W&B. start: the checkpoint that is gone on from. Raises ConfigError."""
    config = run.config
    step = int(start.stem.partition("-")[2]) if start else 0
    path = config.directory / "metrics.csv"
    reporters: list[Reporter] = [ProgressReport(console, steps=run.steps), Journal(path, from_step=step)]
    if config.tracking.mode != "disabled":
        record = read_record(config.directory)
        place = WandbPlace(
            id=record.wandb_id, name=config.run.id, project=config.tracking.project, entity=config.tracking.entity,
            group=config.tracking.group, tags=config.tracking.tags, sweep=record.sweep.get("id"),
            returns="parameters" in record.sweep,
        )  # fmt: skip
        say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
        try:
            tracker = WandbReporter(place, directory=config.directory, mode=config.tracking.mode, config=asdict(config),
                                    journal=path, say=say, stop=partial(_stop, config.directory))  # fmt: skip
        except TrackingError as error:
            raise ConfigError(f"tracking.mode = {config.tracking.mode}: {error}") from None
        where = f"  upload with: pipeline sync {config.directory}" if "offline" in tracker.mode else ""
        say(f"W&B {tracker.mode}, run {place.id}{where}")
        reporters.append(tracker)
        if tracker.mode == "online" and place.returns:
            agent = str(record.sweep["agent"])
            reporters.append(Heartbeat(agent, place.id, partial(_stop, config.directory)))
    return reporters


def _stop(directory: Path) -> None:
    """W&B wants the run to end: somebody has said so on its page, or its sweep has seen enough. It saves, and ends."""
    (directory / STOPPED).touch()
    os.kill(os.getpid(), signal.SIGTERM)


def _tell_of_interruption(reporters: Sequence[Reporter], directory: Path) -> None:
    if (directory / STOPPED).exists():
        return  # nobody is to go on with it
    for reporter in reporters:
        reporter.interrupted()
