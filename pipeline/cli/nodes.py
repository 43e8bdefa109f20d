"""pipeline doctor --nodes: every rank of a job looks, before its first step or alone."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.codes import DONE, FAILED, RESUMABLE, USAGE, code_of

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.doctor.findings import Finding
    from pipeline.doctor.nodes import Examined

_MINUTES = 15  # that the job of a check asks for, besides --timeout
REPORT = "PIPELINE_REPORT"  # set by our job script: the file in which rank 0 leaves the report as JSON


def doctor_nodes(options: argparse.Namespace) -> int:
    from pipeline.world import World

    found = _malicious()
    if found:
        return _refused(options, found)
    if World.is_launched():
        return _as_rank(options)
    from pipeline.cli.runs import typed

    config = typed(options.words)
    return _by_slurm(options, config) if config.cluster.launcher == "slurm" else _here(options, config)


def _malicious() -> list[Finding]:
    """Releases that must not be imported: nothing else of ours that imports them has been, here."""
    from pipeline.doctor.findings import guarded
    from pipeline.doctor.versions import malicious

    return guarded("versions", "packages", malicious)


def _refused(options: argparse.Namespace, found: list[Finding]) -> int:
    from pipeline.doctor import report
    from pipeline.launch.failure import leave_code

    words = json.dumps(report.as_json(options.words, found, 0.0), indent=2)
    print(words if options.json else "\n".join(report.lines(found)))
    return _left(leave_code(USAGE))


def _as_rank(options: argparse.Namespace) -> int:
    """One of the processes that a launcher has started. Whatever ends it, it leaves a code."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its sockets warn of every try
    from pipeline.cli.runs import agree, frozen, of_run
    from pipeline.doctor.meeting import LostError
    from pipeline.doctor.nodes import ARRIVAL_SECONDS, take_part
    from pipeline.launch.failure import leave_code
    from pipeline.world import World

    world, began = World.from_environment(), time.monotonic()

    def read() -> Config:
        config = of_run(frozen(options.words))
        agree(config, world)
        return config

    def report(examined: Examined) -> None:
        _report(options, examined, time.monotonic() - began)

    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0"))
    try:
        end = take_part(world, host, port, read, report, options.timeout or ARRIVAL_SECONDS)
    except LostError as error:
        from pipeline.doctor.facts import host_name

        print(f"pipeline: rank {world.rank} on {host_name()}: {error}; see whether that node is up and reached from "
              "here (interface, route, firewall)", file=sys.stderr)  # fmt: skip
        return _left(leave_code(RESUMABLE if error.gone else USAGE))
    except Exception as error:  # ours to mend: the others will say that this rank is gone, which alone would go on
        leave_code(code_of(error) or FAILED)
        raise
    code = _left(leave_code(end.code))
    if end.stuck:  # a thread in a collective would keep the interpreter from ending
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _left(code: int) -> int:
    """What to exit with: 0 where the job script was left the code, so that srun and torchrun do not speak of it."""
    from pipeline.launch.failure import CODE

    path = os.environ.get(CODE)
    return DONE if path and Path(path).exists() else code


def _report(options: argparse.Namespace, examined: Examined, seconds: float) -> None:
    from pipeline.doctor import ranks, report

    words = report.as_json(options.words, examined.findings, seconds) | ranks.as_json(examined)
    if options.json:
        print(json.dumps(words, indent=2), flush=True)
    else:
        shown = [*ranks.table(examined), "", *report.lines(examined.findings),
                 report.verdict(examined.findings, seconds)]  # fmt: skip
        print("\n".join(shown), flush=True)
    if path := os.environ.get(REPORT):
        with contextlib.suppress(OSError):  # a directory that cannot be written is a finding
            Path(path).write_text(json.dumps(words, indent=2) + "\n")


def _here(options: argparse.Namespace, config: Config) -> int:
    """All ranks on this machine."""
    from pipeline.config import ConfigError, to_yaml
    from pipeline.launch.local import run_processes
    from pipeline.launch.plan import CONFIG

    if config.cluster.nodes > 1:
        raise ConfigError(
            f"cluster.nodes = {config.cluster.nodes}: one machine cannot start several; start torchrun on every node "
            "with `-m pipeline doctor --nodes RUN/config.yaml`, or set cluster.nodes=1"
        )
    with tempfile.TemporaryDirectory(prefix="pipeline-doctor-") as scratch:
        path = Path(scratch) / CONFIG
        path.write_text(to_yaml(config))
        words = ["doctor", "--nodes", *_passed_on(options), str(path)]
        return run_processes(words, processes=config.cluster.devices, threads=config.trainer.threads or 1,
                             logs=Path(scratch), lead_seconds=5)  # fmt: skip


def _passed_on(options: argparse.Namespace) -> list[str]:
    timeout = [f"--timeout={options.timeout:g}"] if options.timeout else []
    return [*(["--json"] if options.json else []), *timeout]


def _by_slurm(options: argparse.Namespace, config: Config) -> int:
    """A job of its own, as the run's would be, and its output here. Its directory lies beside the run's, and goes."""
    from pipeline.doctor.machine import existing
    from pipeline.launch import queue

    if not queue.is_there():
        raise queue.QueueError(
            "sbatch is not found: look at the nodes from where Slurm's commands are, or at this machine with "
            "cluster.launcher=local cluster.nodes=1"
        )
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=existing(Path(config.run.dir))) as scratch:
        directory = Path(scratch)
        job = queue.submit(_written(config, directory, options.timeout or 0.0))
        try:
            queue.follow(job, directory / "logs" / f"job-{job}.log", sys.stderr if options.json else sys.stdout)
        except BaseException:  # Ctrl-C, or a queue that does not answer: nobody waits for it any more
            with contextlib.suppress(queue.QueueError):
                queue.cancel([job])
            raise
        report = directory / "logs" / f"nodes-{job}.json"
        if options.json and report.exists():
            print(report.read_text(), end="")
        try:
            return int((directory / "logs" / "code").read_text())
        except (OSError, ValueError):
            raise queue.QueueError(
                f"job {job} has left the queue and no code in {directory}; if nothing of it is seen above, it was "
                "cancelled, or its nodes do not share run.dir with this machine"
            ) from None


def _written(config: Config, directory: Path, timeout: float) -> Path:
    """The script of a check, and the config that it reads."""
    from dataclasses import replace

    from pipeline.config import completed, to_yaml
    from pipeline.launch.plan import CONFIG
    from pipeline.launch.slurm import ALONE, render_check
    from pipeline.launch.targets import slurm_job

    threads = config.trainer.threads or config.slurm.cpus_per_task or 1
    config = completed(config, trainer={"threads": threads})
    (directory / "logs").mkdir()
    (directory / CONFIG).write_text(to_yaml(config))
    job = slurm_job([completed(config, run={"dir": str(directory.parent), "id": directory.name})])
    most = _MINUTES + math.ceil(timeout / 60)
    minutes = min(job.minutes or most, most)  # the shorter a job is, the sooner a gap is found for it
    script = directory / ALONE
    script.write_text(render_check(
        replace(job, name="doctor", minutes=minutes, lead_minutes=0, options=(*job.options, "--no-requeue")), timeout
    ))  # fmt: skip
    return script
