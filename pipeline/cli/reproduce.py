"""pipeline reproduce: claims about batch normalization, measured on this machine."""

from __future__ import annotations

import argparse
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.codes import DONE
from pipeline.cli.options import add_verb, count

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.experiments.experiment import Experiment, Setting
    from pipeline.experiments.result import Result

_ALL, _WORK = "all", "work"


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = add_verb(verbs, "reproduce", reproduce, "measure what is claimed of batch normalization, on this machine",
                 "pipeline reproduce --list\n"
                 "  pipeline reproduce explosion\n"
                 "  pipeline reproduce steps --data shards/cifar10 --seeds 5\n"
                 "  pipeline reproduce all --data cifar10=shards/cifar10 --data mnist=mnist.zip\n\n"
                 "Each leaves result.json, pictures and a page in its own directory, and a page of all beside them.\n"
                 "Without --data the experiments that train take scikit-learn's digits.", goes_on=True)  # fmt: skip
    p.add_argument("names", nargs="*", metavar="NAME", help="experiments, or all; --list tells them")
    p.add_argument("--list", action="store_true", help="what there is: claims, sources, minutes")
    p.add_argument("--data", action="append", default=[], metavar="[PAGE=]PLACE", help="images to train on: packed "
                   "shards, class folders or a zip of them, to be treated as conf/data/PAGE.yaml does (default PAGE: "
                   "the experiment's first); may be repeated")  # fmt: skip
    p.add_argument("--seeds", type=count, metavar="N", help="repetitions (default: the experiment's)")
    p.add_argument("--full", action="store_true", help="at the size of the claim: hours or days of a GPU")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda with --full where there is one, else cpu")
    p.add_argument("--output", type=Path, default=Path("reproduced"), metavar="DIR", help="default: reproduced/")
    p.add_argument("--again", action="store_true", help="measure anew what was measured before")
    p.add_argument("--markdown", type=Path, metavar="FILE", help="also write all results there, pictures beside it")


def reproduce(options: argparse.Namespace) -> int:
    from rich.console import Console

    from pipeline.config import ConfigError
    from pipeline.experiments.catalog import EXPERIMENTS
    from pipeline.launch.lock import locked

    console = Console(highlight=False)
    if options.list:
        _list(EXPERIMENTS, console)
        return DONE
    names = ", ".join(each.name for each in EXPERIMENTS)
    if not options.names:
        raise ConfigError(f"no experiment is named; choose from {names}, or all")
    chosen = _chosen(options.names, EXPERIMENTS)
    _refuse_strangers(options.data, chosen)
    settings = [_setting(each, options) for each in chosen]
    if options.output.exists() and not options.output.is_dir():
        raise ConfigError(f"--output {options.output} is a file; give a directory")
    if options.markdown and not options.markdown.suffix:
        raise ConfigError(f"--markdown {options.markdown} has no suffix; give FILE.md: FILE/ is for its pictures")
    work = options.output / _WORK
    work.mkdir(parents=True, exist_ok=True)
    with locked(work, instead="--output"):
        try:
            for place, (experiment, setting) in enumerate(zip(chosen, settings, strict=True), 1):
                _one(experiment, setting, options, console, f"{place} of {len(chosen)}: " if len(chosen) > 1 else "")
        finally:
            _together(EXPERIMENTS, options, console)
    return DONE


def _chosen(names: list[str], experiments: tuple[Experiment, ...]) -> list[Experiment]:
    """Raises ConfigError for a name that is none."""
    from pipeline.config import ConfigError

    known = {each.name: each for each in experiments}
    for name in names:
        if name != _ALL and name not in known:
            raise ConfigError(f"{name!r} is no experiment; choose from {', '.join(known)}, or all")
    return list(experiments) if _ALL in names else [known[name] for name in dict.fromkeys(names)]


def _refuse_strangers(words: list[str], chosen: list[Experiment]) -> None:
    """Raises ConfigError for data that none of the experiments trains on, or that does not say for which it is."""
    from pipeline.config import ConfigError

    pages = sorted({page for each in chosen for page in each.data})
    takes = f"takes {' or '.join(pages)}" if pages else "trains on no images"
    who = chosen[0].name if len(chosen) == 1 else "none of these experiments has such a page: they"
    takes = takes if len(chosen) == 1 else takes.replace("takes", "take").replace("trains", "train")
    for word in words:
        page, equals, _ = word.partition("=")
        if not equals and len(chosen) > 1:
            raise ConfigError("--data PLACE does not say which of several experiments it is for; give PAGE=PLACE, as "
                              "cifar10=shards/cifar10")  # fmt: skip
        if not pages or (equals and page not in pages):
            raise ConfigError(f"--data {word}: {who} {takes}; leave it out, or give another")


def _setting(experiment: Experiment, options: argparse.Namespace) -> Setting:
    """Raises ConfigError for what cannot be asked on this machine or in minutes, DataError for a place that is none."""
    import torch

    from pipeline.config import ConfigError
    from pipeline.data.shards import DataError
    from pipeline.experiments.experiment import Setting

    data = {}
    for word in options.data:
        page, equals, place = word.partition("=")
        if not equals:
            page, place = (experiment.data or ("",))[0], word
        if not place:
            raise ConfigError(f"--data {word} names no place; give PLACE or PAGE=PLACE")
        if page in experiment.data:
            if page in experiment.large and not options.full:
                raise ConfigError(f"--data {page}: {experiment.name} takes days of a GPU for it; add --full, or give "
                                  f"{experiment.data[0]}")  # fmt: skip
            if not Path(place).exists():
                raise DataError(f"--data {page}={place} does not exist; give packed shards, class folders or a zip of "
                                "them, or leave it out for scikit-learn's digits")  # fmt: skip
            data[page] = place
    device = options.device or ("cuda" if options.full and torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has no such device that torch can use; leave it out")
    return Setting(seeds=options.seeds or experiment.seeds, work=options.output / _WORK / experiment.name, data=data,
                   full=options.full, device=device)  # fmt: skip


def _list(experiments: tuple[Experiment, ...], console: Console) -> None:
    from rich.markup import escape
    from rich.padding import Padding

    for each in experiments:
        console.print(f"[bold]{each.name}[/bold]  {each.title}")
        data = f"; --data {' or '.join(each.data)}" if each.data else ""
        facts = f"{each.minutes:g} min, {each.seeds} seeds{data}; --full: {each.full}"
        console.print(Padding(f"{escape(each.claim)}\n[dim]{each.source}\n{escape(facts)}[/dim]", (0, 0, 1, 2)))
    total = sum(each.minutes for each in experiments)
    console.print(f"Minutes are of two CPU cores, {total:.0f} for all of them: pipeline reproduce all", soft_wrap=True)


def _one(experiment: Experiment, setting: Setting, options: argparse.Namespace, console: Console, place: str) -> Result:
    """Measure one, or read it, and show it."""
    from dataclasses import replace

    from rich.markup import escape

    from pipeline.experiments.page import PAGE, VERDICTS, write_page, write_pictures
    from pipeline.experiments.result import RESULT, kept, measured

    directory = options.output / experiment.name
    if options.again:
        shutil.rmtree(setting.work, ignore_errors=True)
        (directory / RESULT).unlink(missing_ok=True)
    minutes = f"about {experiment.minutes:g} min on two cores"
    console.print(f"[bold]{place}{experiment.title}[/bold] [dim]{minutes}[/dim]", soft_wrap=True)
    result = kept(experiment, setting, directory)
    if result is not None:
        console.print(f"measured on {result.date}, and kept; --again measures anew", style="dim", soft_wrap=True)
    else:
        with _Bar(console) as progress:
            result = measured(experiment, replace(setting, progress=progress), directory, _command(experiment, options))
    write_pictures(result, directory)
    write_page([result], directory / PAGE, result.command)
    _show(result, console)
    style = {True: "green", False: "red", None: "yellow"}[result.finding.holds]
    console.print(
        f"[{style}]{VERDICTS[result.finding.holds]}[/{style}]: {escape(result.finding.said)}\n", soft_wrap=True
    )
    return result


def _show(result: Result, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    for each in result.finding.tables:
        table = Table(each.head[0], title=each.title, title_justify="left", caption=each.note or None,
                      caption_justify="left")  # fmt: skip
        for head in each.head[1:]:
            table.add_column(head, justify="right")
        for row in each.rows:
            table.add_row(*map(escape, row))
        console.print(table)
    for remark in result.finding.remarks:
        console.print(remark, style="dim", markup=False, soft_wrap=True)


def _together(experiments: tuple[Experiment, ...], options: argparse.Namespace, console: Console) -> None:
    """One page of every result that lies there, whichever call made it."""
    from pipeline.experiments.markdown import write_markdown
    from pipeline.experiments.page import PAGE, write_page
    from pipeline.experiments.result import read_result

    found = [read_result(each, options.output / each.name) for each in experiments]
    results = [result for result in found if result is not None]
    if not results:
        return
    page = options.output / PAGE
    write_page(results, page, shlex.join(["pipeline", *options.arguments]))
    if options.markdown:
        write_markdown(results, options.markdown)
    console.print(f"{page}, and pictures in directories beside it", soft_wrap=True)


def _command(experiment: Experiment, options: argparse.Namespace) -> str:
    """What reproduces this one experiment."""
    words = ["pipeline", "reproduce", experiment.name]
    for word in options.data:
        page = word.partition("=")[0] if "=" in word else ""
        if not page or page in experiment.data:
            words += ["--data", word]
    words += ["--seeds", str(options.seeds)] if options.seeds else []
    words += ["--full"] if options.full else []
    words += ["--device", options.device] if options.device else []
    return shlex.join(words)


class _Bar:
    """What is going on, as a bar on a terminal and as a line for each new thing elsewhere."""

    def __init__(self, console: Console):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._console, self._last = console, ""
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int, what: str) -> None:
        from rich.markup import escape

        self._bar.update(self._task, completed=done, total=total or None, description=escape(what))
        if not self._console.is_terminal and what and what != self._last:
            said = f"  {done} of {total}: {what}" if total else f"  {what}"
            self._console.print(said, markup=False, soft_wrap=True)
        self._last = what
