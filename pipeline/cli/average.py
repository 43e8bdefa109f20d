"""pipeline average: one network of the mean of several checkpoints' weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli.codes import DONE
from pipeline.cli.options import add_verb, count
from pipeline.cli.runs import agree, launch_here, of_run
from pipeline.cli.settling import settled

NAME = "average.ckpt"


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = add_verb(verbs, "average", average, "average the weights of checkpoints of one network into one",
                 "pipeline average runs/first --last 5                                (makes runs/first/average.ckpt)\n"
                 "  pipeline average runs/a/checkpoints/best.ckpt runs/b/checkpoints/best.ckpt --output ab.ckpt\n"
                 "  pipeline evaluate runs/first --checkpoint runs/first/average.ckpt\n\n"
                 "Population statistics are estimated anew for the mean weights: the mean of the members' own is not\n"
                 "theirs, and the table shows what it would score.")  # fmt: skip
    p.add_argument("words", nargs="+", metavar="RUN | FILE | key=value",
                   help="runs, or single checkpoints of them; keys to change in the first one's config")  # fmt: skip
    p.add_argument("--last", type=count, default=1, metavar="N", help="of each run, its newest N checkpoints (default: "
                   "1; trainer.keep_checkpoints says how many a run keeps)")  # fmt: skip
    p.add_argument("--output", type=Path, metavar="FILE", help=f"where to write it (default: RUN/{NAME} of the first)")
    p.add_argument("--no-members", action="store_true", help="score the average alone, and not each of its members")


def average(options: argparse.Namespace) -> int:
    from rich.console import Console

    from pipeline.config import ConfigError
    from pipeline.launch.plan import CONFIG
    from pipeline.world import World

    places = [Path(word) for word in options.words if "=" not in word]
    overrides = [word for word in options.words if "=" in word]
    if not places:
        raise ConfigError("no run is given; give directories like runs/NAME, or checkpoints of them")
    members = _members(places, options.last)
    if len(members) < 2:
        raise ConfigError(f"{members[0]} alone is no average; give --last 2 or more, more runs, or more checkpoints")
    first = next((d for d in (places[0], *places[0].absolute().parents[:2]) if (d / CONFIG).is_file()), None)
    if first is None:
        raise ConfigError(
            f"{places[0]} lies in no run, whose network and data the average is to have; give a run first"
        )
    output: Path = options.output or first / NAME
    if output.exists():
        raise ConfigError(f"{output} is there already; give another --output, or remove it")
    config = settled(of_run(first / CONFIG, overrides))
    if config.world > 1 and not World.is_launched():
        files = [str(path) for path in members]  # single files: a run may write one more meanwhile
        flags = ["--output", str(output), *(["--no-members"] if options.no_members else [])]
        return launch_here(config, ["average", *files, *overrides, *flags])
    from pipeline.run.averaging import average as averaged

    world = World.from_environment()
    agree(config, world)
    console = Console(quiet=not world.leads)
    averaged(config, world, console, members=members, output=output, with_members=not options.no_members)
    console.print(f"written to {output}; score it again with: pipeline evaluate {first} --checkpoint {output}",
                  highlight=False, soft_wrap=True)  # fmt: skip
    return DONE


def _members(places: Sequence[Path], last: int) -> list[Path]:
    """Checkpoints, oldest first in each run. Raises ConfigError."""
    from pipeline.config import ConfigError
    from pipeline.training.checkpoint import checkpoints

    found: list[Path] = []
    for place in places:
        if place.is_dir():
            of_run = checkpoints(place / "checkpoints")
            if len(of_run) < last:
                raise ConfigError(
                    f"--last {last}: {place} has {len(of_run)} checkpoints; ask for fewer, or train with a larger "
                    "trainer.keep_checkpoints"
                )
            found += of_run[-last:] if last else []
        elif place.is_file():
            found.append(place)
        else:
            raise ConfigError(f"{place} is neither a run nor a checkpoint; give a directory like runs/NAME, or a file")
    if len({path.resolve() for path in found}) < len(found):
        raise ConfigError("a checkpoint is given twice; give each once")
    return found
