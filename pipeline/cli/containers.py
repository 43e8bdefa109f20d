"""pipeline launch with cluster.launcher=docker: a run in a container of this machine, or in one a node of several."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli import preflight
from pipeline.cli.codes import DONE, FAILED, RESUMABLE
from pipeline.cli.settling import settle

if TYPE_CHECKING:
    import argparse

    from pipeline.config import Config

_OF_ENGINE = (125, 126, 127)  # it could not start the container, and has said why
_KILLED = (129, 130, 137, 138, 140, 143)


def start(config: Config, options: argparse.Namespace) -> int:
    from pipeline.launch.attached import CommandError, first_of
    from pipeline.launch.plan import identified

    config = identified(config)
    engines = [config.docker.engine] if config.docker.engine else ["docker", "podman"]
    if not (options.dry_run or config.cluster.nodes > 1 or first_of(*engines)):
        raise CommandError(
            f"{' and '.join(engines)} {'are' if engines[1:] else 'is'} not found: launch where containers can be "
            "started, or look at the command with --dry-run"
        )
    code = _examined(config, show=options.dry_run)
    if options.dry_run:
        return code
    if code and not options.force:
        print(preflight.NOT_SUBMITTED, file=sys.stderr)
        return code
    return _started(config)


def _started(config: Config) -> int:
    from pipeline.config import completed
    from pipeline.data.shards import MANIFEST, write_atomically
    from pipeline.launch.attached import attached
    from pipeline.launch.container import SCRIPT, render, starts
    from pipeline.launch.lock import locked
    from pipeline.launch.plan import freeze_run
    from pipeline.launch.targets import container_of

    decoder = config.data.decoder
    config, dataset = settle(config, elsewhere=True)
    config = completed(config, data={"decoder": decoder})  # the image has its own
    with locked(config.directory):
        config = freeze_run(config)
        write_atomically(config.directory / MANIFEST, (dataset.directory / MANIFEST).read_bytes())
        (config.directory / "logs").mkdir(exist_ok=True)
        container = container_of(config)
        text, script = render(container), config.directory / SCRIPT
        write_atomically(script, text.encode())
        script.chmod(0o755)
    print(text, flush=True)
    if container.nodes > 1:
        print(f"one on each machine, all of which see {container.run} and the data; the first is {container.address}:")

        for command in starts(container, script.absolute()):
            print(f"  {command}")
        return DONE
    code = attached([str(script.absolute())])
    if code in _OF_ENGINE:
        print(f"pipeline: {container.engine} did not start the container (code {code}), it says above why; mend that, "
              f"and go on with: {config.way_on}", file=sys.stderr)  # fmt: skip
        return FAILED
    if code in _KILLED:
        print(f"pipeline: the container was killed by signal {code - 128}; go on with: {config.way_on}",
              file=sys.stderr)  # fmt: skip
        return RESUMABLE
    return code


def _examined(config: Config, *, show: bool) -> int:
    from pipeline.launch.container import render
    from pipeline.launch.plan import agreed
    from pipeline.launch.targets import container_of

    config = agreed(config)
    text = render(container_of(config))
    if show:
        print(text, flush=True)
    return preflight.before_submission(config, text, whole=show)


def status(directory: Path) -> int:
    from pipeline.launch.plan import newest_step, read_record

    record = read_record(directory)
    print(f"{directory}: checkpoint of step {newest_step(directory)}, {len(record.starts)} starts")
    for name, state in _containers(directory).items():
        print(f"container {name[:12]}: {state}")
    return DONE


def cancel(directory: Path) -> int:
    from pipeline.launch.attached import asked

    running = [name for name, state in _containers(directory).items() if state.startswith("Up")]
    for name in running:
        asked(_engine(directory), "stop", name, seconds=600)  # which waits until the run has saved
    what = f"stopped container {', '.join(name[:12] for name in running)}" if running else "no container runs here"
    print(f"{directory}: {what}")
    return DONE


def follow(directory: Path) -> int:
    from pipeline.launch.attached import attached

    running = list(_containers(directory))
    if not running:
        print(f"{directory}: no container is here; see {directory / 'logs'}")
        return DONE
    attached([_engine(directory), "logs", "--follow", "--tail=100", running[0]])
    return DONE


def _containers(directory: Path) -> dict[str, str]:
    from pipeline.launch.attached import asked
    from pipeline.launch.container import list_command, listed

    return listed(asked(*list_command(_engine(directory), directory.absolute())))


def _engine(directory: Path) -> str:
    from pipeline.config import read_config
    from pipeline.launch.attached import first_of
    from pipeline.launch.plan import CONFIG

    return read_config(directory / CONFIG).docker.engine or first_of("docker", "podman") or "docker"
