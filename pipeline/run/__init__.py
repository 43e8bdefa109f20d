"""READ THIS FIRST: a run, from its config to its scores. assembly.py builds its parts, watching.py what watches them.

`train` is what every process of a run executes, and evaluating.evaluate what every process of an evaluation does; the
world says which one it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console

from pipeline.config import Config, ConfigError, completed, identity, read_config
from pipeline.data.shards import DataError
from pipeline.evaluation.metrics import Scores
from pipeline.launch.code_state import CODE, code_state
from pipeline.launch.plan import add_to_start, note_start
from pipeline.run.assembly import Assembly, assemble, build_trainer, device_name
from pipeline.run.failures import explained, interruptible
from pipeline.run.initial import TABLE, initialize
from pipeline.run.reports import announce, summarize
from pipeline.run.watching import build_reporters, build_watch, reporting
from pipeline.training.checkpoint import clear, newest, set_aside
from pipeline.training.checkpoint_io import CheckpointFiles, weights_of
from pipeline.training.classifier import Classifier
from pipeline.world import World


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
    with interruptible():
        return _train(assemble(config, world), console, watchers)


def _train(run: Assembly, console: Console, watchers: Sequence[lightning.Callback]) -> Scores | None:
    start = _start(run, console)
    reporters = build_reporters(run, start, console) if run.world.leads else []
    with reporting(reporters, run.config.directory):
        try:
            watch = build_watch(run, reporters, console)
            trainer = build_trainer(run, [*watch.callbacks, *watchers])
            with explained(run, watch.watchdog):
                trainer.fit(run.classifier, datamodule=run.data, ckpt_path=start, weights_only=True)
                if watch.tracking.validated_step != trainer.global_step:
                    trainer.validate(run.classifier, datamodule=run.data, verbose=False)
                    run.checkpoints.keep_best(trainer, run.classifier.scores)
                run.checkpoints.finish()
        except MisconfigurationException as error:
            raise ConfigError(f"{start}: {str(error).splitlines()[0]}") from None
    if run.world.leads:
        summarize(run, trainer.global_step, watch.throughput.elapsed(), console)
    return run.classifier.scores


def _start(run: Assembly, console: Console) -> Path | None:
    """The checkpoint to go on from. The leading rank says where this start begins, and notes on what in run.json."""
    say = run.checkpoints.say = partial(console.print, highlight=False, soft_wrap=True)
    directory = run.checkpoints.directory
    start, faults = newest(directory, identity(run.config))
    initial = initialize(run.classifier.model, run.config) if run.config.model.init and start is None else None
    if run.world.leads:
        clear(directory)
        for path, fault in faults.items():
            say(f"WARNING: {path} is passed over, and now called {set_aside(path).name}: {fault}")
        announce(run, start, console)
        if initial is not None:
            say(f"{initial.line(run.config)}; all of them in {run.config.directory / TABLE}")
            initial.keep(run.config.directory)
        code = code_state()
        code.keep(run.config.directory / CODE)
        add_to_start(run.config.directory, **code.origin)
        facts = {"torch": torch.__version__, "device": device_name(run.config), "code": code.digest}
        for change in note_start(run.config.directory, **facts):
            say(f"WARNING: {change}: samples and their order stay, the bits may not")
    return start


def load_weights(classifier: Classifier, checkpoint: Path) -> dict[str, Any]:
    """Load a checkpoint's weights; returns all of it. Raises DataError or, if it does not fit, ConfigError."""
    state = read_weights(checkpoint)
    try:
        classifier.averaging = None  # of a run that keeps an average, that is the network from here on
        classifier.load_state_dict(weights_of(state))
    except RuntimeError:
        raise ConfigError(
            f"{checkpoint} does not fit the model of this config; leave model.* as the run has it"
        ) from None
    return state


def read_weights(checkpoint: Path) -> dict[str, Any]:
    """All of a checkpoint. Raises DataError."""
    try:
        state: dict[str, Any] = CheckpointFiles().load_checkpoint(checkpoint)
        state["state_dict"], state["global_step"]
    except Exception:  # torch and its unpickler have many ways to say so
        raise DataError(f"{checkpoint} is no whole checkpoint of a run; give another with --checkpoint") from None
    return state
