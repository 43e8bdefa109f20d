"""pipeline launch --multirun: a run for each combination of values, one after another here, or an array of Slurm."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.codes import DONE, FAILED, RESUMABLE

if TYPE_CHECKING:
    import argparse

    from pipeline.config import Config

MOST = 1_000  # runs of one command
_TOGETHER = 8  # runs that a report tells apart
_UNFIT = re.compile(r"[^\w.+-]+", re.ASCII)
_LONGEST = 200  # letters of a directory's name
_SIGNALLED = 128  # a code above it: ended by a signal


@dataclass(frozen=True, slots=True)
class Element:
    """One run: its key=value words, what the others have otherwise, and what lies in its directory."""

    config: Config
    words: list[str]
    values: str
    state: str
    is_done: bool


def start(options: argparse.Namespace) -> int:
    """Raises ConfigError before anything is started, for the first combination that cannot run."""
    from pipeline.config import ConfigError

    if options.array or options.sweep:
        raise ConfigError("--multirun makes its runs of the values it is given; leave out "
                          f"{'--array' if options.array else '--sweep'}")  # fmt: skip
    elements = elements_of(options.words)
    _show(elements)
    launcher, *others = dict.fromkeys(each.config.cluster.launcher for each in elements)
    if others:
        raise ConfigError(f"cluster.launcher = {launcher} and {others[0]}: --multirun starts all of its runs in one "
                          "way; give one cluster")  # fmt: skip
    if launcher not in ("local", "slurm"):
        raise ConfigError(f"cluster.launcher = {launcher}: --multirun starts runs on this machine or by Slurm; launch "
                          "each by itself there")  # fmt: skip
    if options.dry_run and launcher == "local":
        print("nothing was started; leave out --dry-run to start them")
        return DONE
    code = _here(elements) if launcher == "local" else _by_slurm(elements, options)
    if code != RESUMABLE and not options.dry_run:
        _compare(elements)
    return code


def elements_of(words: Sequence[str]) -> list[Element]:
    """Every combination, the last key changing fastest. Raises ConfigError."""
    from pipeline.config import ConfigError, combinations, compose_config

    if files := [word for word in words if "=" not in word]:
        raise ConfigError(f"{files[0]} is not key=value; --multirun composes each of its runs anew")
    made = combinations(words)
    swept = list(made[0].swept)
    if not swept:
        raise ConfigError("--multirun is given one value for each key; write several with commas, as "
                          "optimizer.rate=0.01,0.1, or leave it out")  # fmt: skip
    if "run.id" in swept or "run.dir" in swept:
        raise ConfigError("--multirun names its runs by their values; give one run.id, or none, and one run.dir")
    if len(made) > MOST:
        raise ConfigError(f"--multirun makes {len(made):,} runs of these values; give at most {MOST:,}")
    found, names = [], set[str]()
    for each in made:
        config = compose_config(each.words)
        name = _name(config, each.swept)
        if name in names or len(name) > _LONGEST:
            why = "is that of two of them" if name in names else f"is longer than {_LONGEST} letters"
            raise ConfigError(f"--multirun: the name {name} {why}; give values that differ in letters and digits, or "
                              "fewer of them")  # fmt: skip
        names.add(name)
        words_of_run = [*(word for word in each.words if not word.startswith("run.id=")), f"run.id={name}"]
        found.append(_element(compose_config(words_of_run), words_of_run, each.swept))
    return found


def _element(config: Config, words: list[str], swept: dict[str, str]) -> Element:
    from pipeline.launch.plan import CONFIG, RECORD, STARTED, agreed, newest_step, read_record

    values = ", ".join(f"{key}={value}" for key, value in swept.items())
    agreed(config)  # a directory of that name may hold another run
    if not (config.directory / STARTED).exists() or not (config.directory / RECORD).exists():
        return Element(config, words, values, "new", is_done=False)
    from pipeline.config import read_config

    starts = read_record(config.directory).starts
    before, now = read_config(config.directory / CONFIG).trainer, config.trainer
    as_long = (before.max_steps, before.max_epochs) == (now.max_steps, now.max_epochs)
    if starts and starts[-1].get("ended") == "done" and as_long:
        return Element(config, words, values, "done", is_done=True)
    return Element(config, words, values, f"goes on from step {newest_step(config.directory)}", is_done=False)


def _name(config: Config, swept: dict[str, str]) -> str:
    """The run.id that was given, or recipe and data; then each key, as short as it is clear, with its value.

    What is chosen on an axis is a name already: ensemble-bn_x30_member_0.
    """
    from pipeline.config import AXES

    given = bool(config.run.id)
    last = [key.rpartition(".")[2] for key in swept]
    parts = [config.run.id or f"{config.run.recipe}-{config.run.data}"]
    for key, value in swept.items():
        if key in AXES:
            parts += [value] if given or key not in ("recipe", "data") else []
        else:
            short = key.rpartition(".")[2]
            parts.append(f"{key if last.count(short) > 1 else short}_{_UNFIT.sub('_', value)}")
    return "-".join(parts)


def _show(elements: Sequence[Element]) -> None:
    width = max(len(str(each.config.directory)) for each in elements)
    left = sum(not each.is_done for each in elements)
    print(f"{len(elements)} runs, {left} of them to be started:")
    for each in elements:
        print(f"  {each.config.directory!s:{width}}  {each.state:24} {each.values}")
    sys.stdout.flush()


def _here(elements: Sequence[Element]) -> int:
    """One after another. One that fails does not keep the others from running; its code is that of all."""
    code = DONE
    for number, each in enumerate(elements, 1):
        if each.is_done:
            continue
        print(f"\n{number} of {len(elements)}: {each.config.directory}", flush=True)
        ended = _train(each.words)
        if ended == RESUMABLE:
            print("pipeline: interrupted; the same command goes on from there", file=sys.stderr)
            return RESUMABLE
        if ended:
            print(f"pipeline: {each.config.directory} ended with code {ended}", file=sys.stderr)
        code = code or ended
    return code


def _train(words: Sequence[str]) -> int:
    """The run in a process of its own, which gets the signals that this one gets, and decides what comes of them."""
    from pipeline.launch.attached import attached

    came: list[int] = []
    code = attached([sys.executable, "-m", "pipeline", "train", *words], came)
    # Whoever sent a signal wants all of them to stop, even if the run was done at that moment.
    if came and (code in (DONE, RESUMABLE) or code > _SIGNALLED):
        return RESUMABLE
    return FAILED if code > _SIGNALLED else code


def _by_slurm(elements: Sequence[Element], options: argparse.Namespace) -> int:
    """One array of those that are not done and have no job."""
    from pipeline.cli import jobs

    left = [each.config for each in elements if not each.is_done and not jobs.is_queued(each.config)]
    if not left:
        print("nothing to submit: each is done, or in the queue")
        return DONE
    return jobs.start_all(left, options)


def _compare(elements: Sequence[Element]) -> None:
    paths = [str(each.config.directory) for each in elements]
    groups = [paths[i : i + _TOGETHER] for i in range(0, len(paths), _TOGETHER)]
    output = Path(elements[0].config.run.dir)
    for number, group in enumerate(groups, 1):
        place = output / f"comparison{f'-{number}' if len(groups) > 1 else ''}"
        print(f"compare them with: pipeline report {' '.join(group)} --output {place}")
