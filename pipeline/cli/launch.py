"""pipeline launch: a run where others start its processes: a job of Slurm, containers, machines of a cloud."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.cli import clouds, containers, jobs, multirun
from pipeline.cli.options import add_verb
from pipeline.cli.runs import typed
from pipeline.cli.sweep import draw

_TARGETS = {"slurm": jobs, "docker": containers, "skypilot": clouds}


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = add_verb(
        verbs, "launch", launch, "start a run by Slurm, in containers or on a cloud, or go on with one; look after it",
        "pipeline launch recipe=bn_x5 data=imagenet cluster=slurm_4x8 slurm.partition=gpu run.id=first\n"
        "  pipeline launch recipe=bn_x5 data=digits cluster=docker cluster.devices=8 run.id=first\n"
        "  pipeline launch recipe=bn_x5 data=imagenet data.root=s3://ours/imagenet cluster=skypilot \\\n"
        "    skypilot.image=REGISTRY/pipeline:1 skypilot.bucket=s3://ours/runs run.id=first\n"
        "  pipeline launch --sweep vision/pipeline/x1y2z3 --array 0-7%2 recipe=bn_x5 data=cifar10 cluster=slurm_1x8\n"
        "  pipeline launch --multirun optimizer.rate=0.01,0.1 seed=0,1,2 recipe=bn_x5 data=digits run.id=rates\n"
        "  pipeline launch --follow runs/first\n\n"
        "pipeline doctor looks first: a fault in config or environment ends it with code 2, one in data with 3",
    )  # fmt: skip
    p.add_argument(
        "words", nargs="*", metavar="key=value | RUN/config.yaml",
        help="overrides of conf/config.yaml, or of a frozen config",
    )  # fmt: skip
    p.add_argument("--dry-run", action="store_true", help="show what would be submitted or started, and what doctor "
                   "says of it; stop")  # fmt: skip
    p.add_argument("--force", action="store_true", help="submit it although doctor has found a fault")
    p.add_argument("--array", default="", metavar="0-5%2", help="by Slurm: a run for each number, which is its seed "
                   "and the end of its id; after %%, how many at a time")  # fmt: skip
    p.add_argument("--sweep", default="", metavar="ENTITY/PROJECT/SWEEP", help="by Slurm: a sweep of W&B, which gives "
                   "each run its parameters when it first starts")  # fmt: skip
    p.add_argument("--multirun", action="store_true", help="a run for each combination of the values of key=a,b,c, "
                   "named after them: one after another here, or one array of Slurm; none is run twice")  # fmt: skip
    p.add_argument("--status", metavar="RUN", help="how far a run is, and where its jobs stand")
    p.add_argument("--cancel", metavar="RUN", help="end a run's jobs; the command that launched it goes on")
    p.add_argument("--follow", metavar="RUN", help="show what a run prints, until Ctrl-C")
    p.add_argument("--draw", metavar="RUN", help="what a job does first in a run of a sweep: get its parameters, once "
                   "(exit code 4: there are no more)")  # fmt: skip


def launch(options: argparse.Namespace) -> int:
    from pipeline.config import ConfigError

    asked = [f"--{name}" for name in ("status", "cancel", "follow", "draw") if getattr(options, name) is not None]
    if len(asked) > 1 or (
        asked
        and (options.words or options.array or options.sweep or options.dry_run or options.force or options.multirun)
    ):
        raise ConfigError(
            f"{asked[0]} RUN stands alone; leave out {' '.join(asked[1:] or options.words) or 'the rest'}"
        )
    if asked:
        name = asked[0].removeprefix("--")
        directory = Path(getattr(options, name))
        target = _TARGETS[_launcher_of(directory)]
        looks = {"status": target.status, "cancel": target.cancel, "follow": target.follow, "draw": draw}
        code: int = looks[name](directory)
        return code

    if options.multirun:
        return multirun.start(options)
    config = typed(options.words)
    launcher = config.cluster.launcher
    if launcher not in _TARGETS:
        raise ConfigError(
            f"cluster.launcher = {launcher}: there is nothing to submit; choose cluster=slurm_1x8 or another page of "
            "Slurm, cluster=docker or cluster=skypilot, or train here with `pipeline train`"
        )
    if launcher != "slurm" and (options.array or options.sweep):
        flag = f"--array {options.array}" if options.array else f"--sweep {options.sweep}"
        raise ConfigError(f"{flag} is for Slurm, and cluster.launcher = {launcher}; launch each run by itself")
    code = _TARGETS[launcher].start(config, options)
    return code


def _launcher_of(directory: Path) -> str:
    """Where a run was launched last; slurm where nothing says so, whose own words then name what is missing."""
    from pipeline.config import ConfigError, read_config
    from pipeline.launch.plan import CONFIG

    try:
        launcher = read_config(directory / CONFIG).cluster.launcher
    except ConfigError:
        return "slurm"
    return launcher if launcher in _TARGETS else "slurm"
