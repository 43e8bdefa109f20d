"""What watches a run, built from its config: watchdog, losses, reporters."""

from __future__ import annotations

import copy
import math
import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.console import Console

from pipeline.callbacks.activations import Activations
from pipeline.callbacks.alerts import Alerts
from pipeline.callbacks.artifacts import artifacts
from pipeline.callbacks.bad_samples import BadSamples
from pipeline.callbacks.gradient_layout import GradientLayout
from pipeline.callbacks.gradients import Gradients
from pipeline.callbacks.histogram import weights
from pipeline.callbacks.journal import Journal
from pipeline.callbacks.ledger import Ledger
from pipeline.callbacks.losses import Losses
from pipeline.callbacks.norms import Norms
from pipeline.callbacks.population import Population
from pipeline.callbacks.preemption import InterruptedRunError, Preemption, SameStart
from pipeline.callbacks.progress import ProgressReport
from pipeline.callbacks.statistics import Beside
from pipeline.callbacks.stragglers import FILE, Seat, Stragglers
from pipeline.callbacks.sweep import Agent
from pipeline.callbacks.system import System
from pipeline.callbacks.throughput import Throughput
from pipeline.callbacks.tracking import Circumstance, Reporter, Tracking
from pipeline.callbacks.wandb_reporter import TrackingError, WandbReporter
from pipeline.callbacks.wandb_server import WandbPlace
from pipeline.callbacks.watchdog import Watchdog
from pipeline.config import Config, ConfigError
from pipeline.launch.failure import AGAIN, FailedRunError
from pipeline.launch.heartbeat import Heartbeat, heartbeat_path
from pipeline.launch.plan import STOPPED, RunRecord, add_to_start, failed_in_a_row, newest_step, read_record
from pipeline.launch.pulse import Pulse, pulse_path
from pipeline.norm import revert
from pipeline.norm.preactivations import chosen, layers
from pipeline.run.assembly import Assembly, device_name
from pipeline.training.operations import operations_per_image, peak_operations


@dataclass(frozen=True, slots=True)
class Watch:
    """All callbacks of a training in the order in which Lightning calls them, and those that `train` asks."""

    callbacks: list[lightning.Callback]
    throughput: Throughput
    tracking: Tracking
    watchdog: Watchdog


def build_watch(run: Assembly, reporters: Sequence[Reporter], console: Console) -> Watch:
    config, world = run.config, run.world
    alerts = next((reporter for reporter in reporters if isinstance(reporter, Alerts)), None)
    watchdog, losses = build_watchdog(run, console, alerts), build_losses(run, alerts)
    throughput = Throughput(watchdog.pulse, every_steps=config.tracking.every_steps, rank=world.rank, world=world.size)
    stragglers = build_stragglers(run, console) if world.leads and world.size > 1 else None
    tracking = Tracking(
        throughput,
        every_steps=config.tracking.every_steps,
        global_batch_size=config.data.global_batch_size,
        images=run.classifier.schedule.images,
        circumstance=circumstance(run),
        reporters=reporters,
        stragglers=stragglers,
    )

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
    beside: list[lightning.Callback] = [Beside(lambda: population.running)] if config.norm.compare else []
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
    same_start = SameStart(
        losses.agreement,
        timedelta(minutes=config.cluster.timeout_minutes),
        node=world.node,
        machine=machine(config),
        tell=partial(_note_machines, config.directory, stragglers) if world.leads else lambda machines: None,
    )
    layout = GradientLayout(config.data.image_size)
    # Looks come before the row of their step, with which W&B gets what they have seen.
    check_layers(run)
    looks = build_looks(run, reporters)
    callbacks: list[lightning.Callback] = [same_start, layout, throughput, population, *beside, *looks, tracking]
    callbacks += [reporter for reporter in reporters if isinstance(reporter, ProgressReport)]
    if config.ledger:
        callbacks.append(Ledger(config.directory / "ledger", rank=world.rank, keys=run.data.keys))
    callbacks += [bad_samples, losses, run.checkpoints, preemption, watchdog]
    return Watch(callbacks, throughput, tracking, watchdog)


def build_looks(run: Assembly, reporters: Sequence[Reporter]) -> list[lightning.Callback]:
    """What looks at this node, by its first rank, and into the network at single steps, by the leading one."""
    directory, tracking, world = run.config.directory, run.config.tracking, run.world

    def tell(figures: Mapping[str, Any]) -> None:
        for reporter in reporters:
            if isinstance(reporter, WandbReporter):
                reporter.look(figures)

    looks: list[lightning.Callback] = []
    if (seconds := tracking.system_every_seconds) and world.local_rank == 0:
        looks.append(System(directory, node=world.node, every_seconds=seconds, every_steps=tracking.every_steps,
                            tell=tell if world.leads else None))  # fmt: skip
    if not world.leads:
        return looks
    if every := tracking.norms_every_steps:
        looks.append(Norms(directory / "norms.csv", every_steps=every))
    if every := tracking.percentiles_every_steps:
        looks.append(Activations(directory / "percentiles.csv", every_steps=every, patterns=tracking.layers, tell=tell))
    if every := tracking.gradients_every_steps:
        looks.append(Gradients(directory / "gradients.csv", every_steps=every, patterns=tracking.layers, tell=tell))
    return looks


def check_layers(run: Assembly) -> None:
    """Raises ConfigError where tracking.layers fits no layer of the network that is to be looked at."""
    tracking, model = run.config.tracking, run.classifier.model
    for key, every, names in (
        ("percentiles_every_steps", tracking.percentiles_every_steps, layers(model)),
        ("gradients_every_steps", tracking.gradients_every_steps, list(weights(model))),
    ):
        if every and tracking.layers and not chosen(names, tracking.layers):
            raise ConfigError(
                f"tracking.layers = {tracking.layers} fits none of the {len(names)} layers that tracking.{key} looks at"
                f": {', '.join(names[:1])} to {', '.join(names[-1:])}; give patterns of their names, or set it to 0"
            )


def circumstance(run: Assembly) -> Circumstance:
    """Where this start happens, for the rank that reports."""
    config = run.config
    if not run.world.leads:  # nor may it read run.json: the leading one may not have noted this start yet
        return Circumstance()
    began = str(read_record(config.directory).starts[0]["at"])
    peak = peak_operations(device_name(config), config.trainer.precision)
    model = revert(copy.deepcopy(run.classifier.model)) if peak else None
    return Circumstance(
        ranks=run.world.size,
        nodes=config.cluster.nodes,
        began=datetime.fromisoformat(began).timestamp(),
        operations=_operations(run, model) if model else (),
        peak=peak,
    )


def _operations(run: Assembly, model: torch.nn.Module) -> tuple[float, ...]:
    """Of an image, epoch by epoch until images have their full size."""
    augment = run.data.train_loader.shares.augment
    epochs = math.ceil(augment.growth.epochs) if augment.growth else 0
    sizes = [augment.at(epoch).size for epoch in range(epochs + 1)]
    counted = {size: float(operations_per_image(model, size)) for size in {*sizes}}
    return tuple(counted[size] for size in sizes)


def machine(config: Config) -> str:
    """What this process runs on: host, device, cores, memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{socket.gethostname()}: {device_name(config)}, {os.cpu_count()} cores, {memory:.0f} GB"


def _note_machines(directory: Path, stragglers: Stragglers | None, machines: list[tuple[int, str]]) -> None:
    """In run.json: each machine of this start, with how many ranks it has."""
    counted = Counter(name for _, name in machines)
    add_to_start(directory, machines=[{"machine": name, "ranks": n} for name, n in counted.items()])
    if stragglers is not None:
        stragglers.seats = [Seat(node, name.partition(":")[0]) for node, name in machines]


def build_stragglers(run: Assembly, console: Console) -> Stragglers:
    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    return Stragglers(run.config.directory / FILE, say=say)


def build_watchdog(run: Assembly, console: Console, alerts: Alerts | None) -> Watchdog:
    config, world = run.config, run.world
    beats_at = heartbeat_path(world.local_rank)
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
        tell=alerts.stall if alerts else lambda text: None,
        heartbeat=Heartbeat(beats_at) if beats_at else None,
    )


def build_losses(run: Assembly, alerts: Alerts | None) -> Losses:
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
        tell=alerts.bad_loss if alerts else lambda text: None,
    )


def build_reporters(run: Assembly, start: Path | None, console: Console) -> list[Reporter]:
    """Terminal, metrics.csv and W&B. start: the checkpoint that is gone on from. Raises ConfigError."""
    config = run.config
    step = int(start.stem.partition("-")[2]) if start else 0
    path = config.directory / "metrics.csv"
    journal = Journal(path, from_step=step)
    if journal.undone is not None:  # of a start that went further than its last checkpoint
        add_to_start(config.directory, undone={"step": journal.undone.step, "at": journal.undone.at})
    reporters: list[Reporter] = [ProgressReport(console, steps=run.steps), journal]
    if config.tracking.mode != "disabled":
        record = read_record(config.directory)
        place = WandbPlace(
            id=record.wandb_id, name=config.run.id, project=config.tracking.project, entity=config.tracking.entity,
            group=config.tracking.group, tags=config.tracking.tags, sweep=record.sweep.get("id"),
            returns="parameters" in record.sweep,
        )  # fmt: skip
        say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
        newest = record.starts[-1]
        kept = artifacts(config.directory, place.id, config.run.data, config.tracking.artifacts, place.where)
        code = {name: newest[name] for name in ("code", "commit", "changed", "changes", "remote") if name in newest}
        try:
            tracker = WandbReporter(place, directory=config.directory, mode=config.tracking.mode,
                                    config=asdict(config) | {"code": code}, journal=path, artifacts=kept,
                                    say=say, stop=partial(_stop, config.directory))  # fmt: skip
        except TrackingError as error:
            raise ConfigError(f"tracking.mode = {config.tracking.mode}: {error}") from None
        where = f"  upload with: pipeline sync {config.directory}" if "offline" in tracker.mode else ""
        say(f"W&B {tracker.mode}, run {place.id}{where}")
        reporters.append(tracker)
        if tracker.mode == "online":
            reporters.append(build_alerts(config, record, tracker))
        if tracker.mode == "online" and place.returns:
            agent = str(record.sweep["agent"])
            reporters.append(Agent(agent, place.id, partial(_stop, config.directory)))
    return reporters


@contextmanager
def reporting(reporters: Sequence[Reporter], directory: Path) -> Iterator[None]:
    """Close them behind what runs inside, with a word to W&B if it failed: one that was interrupted has said so."""
    with ExitStack() as stack:
        for reporter in reversed(reporters):
            stack.callback(reporter.close)  # of each, even if a signal cuts another one's short
        try:
            yield
        except InterruptedRunError:
            raise
        except Exception as error:
            if isinstance(error, FailedRunError) and error.code == AGAIN:
                _tell_of_interruption(reporters, directory)
            else:
                _tell_of_failure(reporters)
            raise
        except BaseException:  # a signal outside of the steps
            _tell_of_interruption(reporters, directory)
            raise


def _tell_of_failure(reporters: Sequence[Reporter]) -> None:
    for reporter in reporters:
        if isinstance(reporter, WandbReporter):
            reporter.failed()


def build_alerts(config: Config, record: RunRecord, tracker: WandbReporter) -> Alerts:
    """Alerts of a run, of which the first is that this start follows others that failed where it goes on."""
    began = datetime.fromisoformat(str(record.starts[0]["at"])).timestamp()
    alerts = Alerts(tracker.alert, name=config.run.id, directory=config.directory.resolve(), command=config.way_on,
                    began=began, goodput=config.tracking.goodput_alert)  # fmt: skip
    allowed, step = config.run.stalled_starts, newest_step(config.directory)
    failed = failed_in_a_row(record.starts[:-1], step)
    if allowed and failed >= max(allowed - 1, 1):  # the last one before a refusal, of which W&B would not hear
        alerts.crash_loop(failed, step, allowed)
    return alerts


def _stop(directory: Path) -> None:
    """W&B wants the run to end: somebody has said so on its page, or its sweep has seen enough. It saves, and ends."""
    (directory / STOPPED).touch()
    os.kill(os.getpid(), signal.SIGTERM)


def _tell_of_interruption(reporters: Sequence[Reporter], directory: Path) -> None:
    if (directory / STOPPED).exists():
        return  # nobody is to go on with it
    for reporter in reporters:
        reporter.interrupted()
