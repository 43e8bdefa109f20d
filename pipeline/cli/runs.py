"""pipeline train: a run from its config to its end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.codes import DONE, FAILED, RESUMABLE, code_of
from pipeline.cli.options import add_verb
from pipeline.cli.settling import settle

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.data.dataset import Dataset
    from pipeline.launch.failure import FailedRunError
    from pipeline.world import World


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = add_verb(verbs, "train", train, "train a recipe on a data set, or go on with a run",
                 "pipeline train recipe=bn_x5 data=cifar10 cluster.devices=2 run.id=first\n"
                 "  pipeline train runs/first/config.yaml trainer.max_epochs=20", goes_on=True)  # fmt: skip
    p.add_argument(
        "words", nargs="*", metavar="key=value | RUN/config.yaml",
        help="overrides of conf/config.yaml, or of a frozen config; --print-config lists all keys",
    )  # fmt: skip
    p.add_argument("--print-config", action="store_true", help="show the resolved config and stop")


def train(options: argparse.Namespace) -> int:
    from pipeline.config import ConfigError, to_yaml
    from pipeline.world import TARGET, World

    if World.is_launched():  # one process of several: the config is frozen
        return _train_launched(of_run(frozen(options.words)))
    config = typed(options.words)
    if options.print_config:
        print(to_yaml(config), end="")
        return DONE
    if config.cluster.launcher not in ("local", os.environ.get(TARGET)):
        raise ConfigError(
            f"cluster.launcher = {config.cluster.launcher}: submit it with `pipeline launch`, or train on this machine "
            "with cluster.launcher=local cluster.nodes=1"
        )
    node = _node(config)
    from pipeline.data.shards import MANIFEST, write_atomically
    from pipeline.launch.failure import FailedRunError
    from pipeline.launch.lock import locked
    from pipeline.launch.plan import CONFIG, named, open_run
    from pipeline.launch.sweep import by_agent

    config, dataset = settle(by_agent(config))
    config = named(config)
    if node:
        return _train_beside(config, dataset, node)
    with locked(config.directory):
        while True:
            config = open_run(config)
            write_atomically(config.directory / MANIFEST, (dataset.directory / MANIFEST).read_bytes())
            words = ["train", str(config.directory / CONFIG)]
            try:
                if config.world == 1:
                    return _noted(config, lambda: _train_here(config))  # noqa: B023  (called at once)
                return _noted(config, lambda: launch_here(config, words, dataset))  # noqa: B023
            except FailedRunError as failure:
                if not failure.restart or config.cluster.nodes > 1:  # several nodes start again together
                    raise _with_way_on(failure, config) from None
                print(f"pipeline: {failure}", file=sys.stderr)


def typed(words: Sequence[str]) -> Config:
    """The config of a command line: overrides, or those of a frozen one. Raises ConfigError."""
    from pipeline.config import ConfigError, compose_config

    files = [word for word in words if word.endswith((".yaml", ".yml")) and "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"{files[1]} is a second config; give one RUN/config.yaml, and key=value behind it")
    overrides = [word for word in words if word not in files]
    return of_run(Path(files[0]), overrides) if files else compose_config(overrides)


def of_run(path: Path, overrides: Sequence[str] = ()) -> Config:
    """A frozen config. One that lies in its run's directory belongs to that directory, wherever it was moved."""
    from pipeline.config import completed, read_config
    from pipeline.launch.plan import RECORD

    config = read_config(path, overrides)
    if any(word.startswith("model.init=") for word in overrides):  # which file it is has to be seen again
        config = completed(config, model={"init_digest": ""})
    if (path.parent / RECORD).is_file():
        # An array finds runs that have names of their own by links.
        directory = path.parent.resolve() if path.parent.is_symlink() else path.parent
        config = completed(config, run={"dir": str(directory.parent), "id": directory.name})
    return config


def _train_here(config: Config) -> int:
    from rich.console import Console

    from pipeline import run
    from pipeline.callbacks.preemption import InterruptedRunError
    from pipeline.launch.failure import FailedRunError, leave_verdict
    from pipeline.launch.plan import STOPPED
    from pipeline.world import World

    world = World.from_environment()
    agree(config, world)
    try:
        run.train(config, world, Console(quiet=not world.leads))
    except InterruptedRunError as interruption:
        stopped = (config.directory / STOPPED).exists()
        if world.leads:
            why = "stopped by W&B: " if stopped else ""
            print(f"pipeline: {why}{interruption}; go on with: {config.way_on}", file=sys.stderr)
        return DONE if stopped else RESUMABLE
    except FailedRunError as failure:
        if config.world == 1:
            raise
        said = leave_verdict(failure)  # our launcher says it, once
        if world.rank if said else world.leads or not failure.shared:
            print(f"pipeline: {_with_way_on(failure, config)}", file=sys.stderr)
        sys.exit(failure.code)  # not returned: a failed start counts as one, whatever its code
    return DONE


def _with_way_on(failure: FailedRunError, config: Config) -> FailedRunError:
    """The same, with the command that goes on or the place of the logs."""
    from pipeline.launch.failure import AGAIN, FailedRunError
    from pipeline.launch.plan import newest_step

    if failure.code != AGAIN:
        return FailedRunError(f"{failure}; logs: {config.directory / 'logs'}", code=failure.code)
    step = newest_step(config.directory)
    begin = f"from step {step}" if step else "from the beginning, there is no checkpoint yet,"
    return FailedRunError(f"{failure}; go on {begin} with: {config.way_on}", code=failure.code)


def _train_launched(config: Config) -> int:
    """One rank. Where another launcher than ours started it, the leading one holds the directory and keeps run.json."""
    from pipeline.launch.failure import leave_code
    from pipeline.launch.local import LAUNCHER

    if os.environ.get(LAUNCHER):
        return _train_here(config)
    try:
        code = _train_as_task(config)
    except SystemExit as ending:
        leave_code(ending.code if isinstance(ending.code, int) else FAILED)
        raise
    except Exception as error:
        leave_code(code_of(error) or FAILED)
        raise
    return leave_code(code)


def _train_as_task(config: Config) -> int:
    from pipeline.launch.lock import locked
    from pipeline.launch.plan import begin_run
    from pipeline.world import SLURM, World

    world = World.from_environment()
    agree(config, world)
    os.environ.update(world.environment())
    if not world.leads:
        return _train_here(config)
    with locked(config.directory):
        if os.environ.get(SLURM):  # each start of a job is one of the run
            begin_run(config, job=os.environ.get("SLURM_JOB_ID", ""))
        return _noted(config, lambda: _train_here(config))


def _noted(config: Config, start: Callable[[], int]) -> int:
    """Run, and note in run.json how it ended."""
    from pipeline.launch.plan import close_run

    ended = "failed"
    try:
        code = start()
        ended = {DONE: "done", RESUMABLE: "interrupted"}.get(code, ended)
        return code
    except KeyboardInterrupt:
        ended = "interrupted"
        raise
    finally:
        try:
            close_run(config.directory, ended)
        except OSError as error:
            print(f"pipeline: {config.directory}/run.json lacks this end: {error.strerror}", file=sys.stderr)


def frozen(words: list[str]) -> Path:
    from pipeline.config import ConfigError

    if len(words) != 1 or not words[0].endswith((".yaml", ".yml")):
        raise ConfigError(
            f"a process started by a launcher (RANK is set) takes the frozen config alone, "
            f"not {' '.join(words) or 'none'}; give RUN/config.yaml, or unset RANK"
        )
    return Path(words[0])


def agree(config: Config, world: World) -> None:
    """What the launcher started is what was asked for, or nothing starts."""
    from pipeline.config import ConfigError

    if world.size != config.world:
        raise ConfigError(
            f"cluster.nodes x cluster.devices = {config.world}, but the launcher started {world.size} processes; "
            "make them equal"
        )
    if world.local_size != config.cluster.devices:
        raise ConfigError(
            f"cluster.devices = {config.cluster.devices} processes a node, but the launcher started "
            f"{world.local_size} on node {world.node}; make them equal"
        )


def _node(config: Config) -> int:
    """Which of the run's nodes this is. Raises ConfigError where it is none of them, or nobody has said which."""
    from pipeline.config import ConfigError
    from pipeline.world import NODE

    number, nodes = os.environ.get(NODE, ""), config.cluster.nodes
    if nodes == 1 or not number:
        return 0
    if not number.isdecimal() or int(number) >= nodes:
        raise ConfigError(f"{NODE} = {number} is none of cluster.nodes = {nodes}, which count from 0; start each once")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ConfigError(f"{name} is not set on node {number} of {nodes}; give that of the first node on all")
    return int(number)


def _train_beside(config: Config, dataset: Dataset, node: int) -> int:
    """A node that does not lead. It has a copy of the config: what the leading one writes may be seen here late."""
    import tempfile

    from pipeline.config import to_yaml
    from pipeline.launch.failure import FailedRunError
    from pipeline.launch.plan import CONFIG, joined

    config = joined(config)
    with tempfile.TemporaryDirectory(prefix=f"pipeline-node-{node}-") as scratch:
        path = Path(scratch) / CONFIG
        path.write_text(to_yaml(config))
        try:
            return launch_here(config, ["train", str(path)], dataset)
        except FailedRunError as failure:
            raise _with_way_on(failure, config) from None


def launch_here(config: Config, arguments: list[str], dataset: Dataset | None = None) -> int:
    from pipeline.config import ConfigError
    from pipeline.launch.local import run_processes
    from pipeline.world import NODE

    if config.cluster.nodes > 1 and NODE not in os.environ:
        raise ConfigError(
            f"cluster.nodes = {config.cluster.nodes}: one machine cannot start several; start RUN/config.yaml on every "
            f"node with {NODE}, MASTER_ADDR and MASTER_PORT or with torchrun, or set cluster.nodes=1"
        )
    return run_processes(
        arguments,
        processes=config.cluster.devices,
        threads=config.trainer.threads,
        logs=config.directory / "logs",
        lead_seconds=config.cluster.lead_seconds,
        node=_node(config),
        nodes=config.cluster.nodes,
        name=lambda rank, epoch, number: _sample_names(config, dataset)(rank, epoch, number) if dataset else [],
    )


def _sample_names(config: Config, dataset: Dataset) -> Callable[[int, int, int], list[str]]:
    from pipeline.data.images import open_images
    from pipeline.data.loader import Batching, sample_names

    data = config.data
    images = open_images(dataset, "train", data.num_classes, data.window)
    return sample_names(
        images.split,
        Batching(
            data.global_batch_size,
            data.micro_batch_size,
            world=config.world,
            seed=config.seed,
            window=data.window,
        ),
    )


def checkpoint_of(directory: Path, wanted: str) -> Path:
    from pipeline.config import ConfigError
    from pipeline.training.checkpoint import BEST, newest

    folder = directory / "checkpoints"
    path = newest(folder)[0] if wanted == "newest" else folder / BEST if wanted == "best" else Path(wanted)
    if path is None or not path.is_file():
        raise ConfigError(f"--checkpoint {wanted}: there is none in {folder}; train first, or give a file")
    return path
