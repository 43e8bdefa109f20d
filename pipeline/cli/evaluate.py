"""pipeline evaluate: scores of a run's checkpoint, or of several runs and of their mean, and a page about them."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.codes import DONE
from pipeline.cli.options import add_verb
from pipeline.cli.progress import Progress
from pipeline.cli.runs import agree, checkpoint_of, launch_here, of_run
from pipeline.cli.settling import settle

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.cli.judgement import Judge
    from pipeline.config import Config
    from pipeline.data.dataset import Dataset
    from pipeline.data.evaluation_set import EvaluationSet
    from pipeline.run.evaluating import Question

_VIEWS = (1, 10, 144)  # as data/crops.py has them, which takes a second to load


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = add_verb(verbs, "evaluate", evaluate, "score runs on the validation images, alone and as an ensemble",
                 "pipeline evaluate runs/first --checkpoint best --views 10 cluster.devices=2\n"
                 "  pipeline evaluate runs/member-0 runs/member-1 runs/member-2 --views 144\n"
                 "  pipeline evaluate runs/first --set imagenetv2-matched-frequency-format-val\n"
                 "  pipeline evaluate runs/first --labels real.json", goes_on=True)  # fmt: skip
    p.add_argument("run", help="a run's directory; behind it more of them, and keys to change")
    p.add_argument("words", nargs="*", metavar="RUN | key=value",
                   help="more runs: their class probabilities are averaged; keys to change in every run")  # fmt: skip
    p.add_argument("--views", type=int, choices=_VIEWS, default=1,
                   help="of each image: the centre, also its corners, or GoogLeNet's (default: 1)")  # fmt: skip
    p.add_argument("--checkpoint", default="newest",
                   help="newest, best, or, of one run, a file (default: newest)")  # fmt: skip
    p.add_argument("--output", type=Path, metavar="DIR",
                   help="of an ensemble, its table and predictions (default: beside the first run)")  # fmt: skip
    p.add_argument("--set", metavar="PLACE", help="other images than the run's own validation images: class folders "
                   "named like its classes or by their numbers, a zip of them, ILSVRC2012, packed shards, or their URL"
                   )  # fmt: skip
    p.add_argument("--labels", type=Path, metavar="FILE", help="right answers for each image, as ReaL's real.json: a "
                   "list by the number of ILSVRC2012's image, or an object by key")  # fmt: skip
    p.add_argument("--within", action="store_true",
                   help="answer with the classes of --set alone, where it has fewer than the run")  # fmt: skip
    p.add_argument("--no-page", action="store_true", help="leave out the page of classes, confusions and confidence")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def evaluate(options: argparse.Namespace) -> int:
    from pipeline.config import ConfigError
    from pipeline.launch.plan import CONFIG

    words = [options.run, *options.words]
    overrides = [word for word in words if "=" in word and not (Path(word) / CONFIG).is_file()]
    runs = [Path(word) for word in words if word not in overrides]
    if not runs:
        raise ConfigError(f"no run is given, only {overrides[0]}; give a directory like runs/NAME before it")
    if len({run.resolve() for run in runs}) < len(runs):
        raise ConfigError("a run is given twice; give each member of an ensemble once")
    if len(runs) > 1 and options.checkpoint not in ("newest", "best"):
        raise ConfigError(f"--checkpoint {options.checkpoint} is one file for {len(runs)} runs; give newest or best")
    if options.within and not options.set:
        raise ConfigError("--within is of the classes of --set; give that, or leave it out")
    if len(runs) == 1 and options.output:
        raise ConfigError(f"--output {options.output} is for the table of several runs; one has its own directory")
    questions = [_asked(run, options, overrides) for run in runs]
    _refuse_strangers(questions)
    for place, question in enumerate(questions, 1):
        if len(questions) > 1:
            _console(options).print(f"{question.config.directory}, {place} of {len(questions)}", highlight=False)
        code = _answer(question, options, overrides)
        if code != DONE:
            return code
    if _shows():
        _show(questions[0], options) if len(questions) == 1 else _compare(questions, options)
    return DONE


def _asked(directory: Path, options: argparse.Namespace, overrides: list[str]) -> Question:
    from pipeline.config import ConfigError
    from pipeline.launch.plan import CONFIG
    from pipeline.run.evaluating import ask

    if not (directory / CONFIG).is_file():
        raise ConfigError(f"{directory} is no run: it holds no {CONFIG}; give a directory like runs/NAME")
    config = of_run(directory / CONFIG, overrides)
    checkpoint = checkpoint_of(directory, options.checkpoint)
    config, dataset = settle(config)
    source = _source(config, dataset, options)
    if options.labels and _shows():  # before anything is evaluated
        from pipeline.data.evaluation_set import accepted_answers

        split = source.dataset.split(source.split, source.classes)
        accepted_answers(options.labels, [split.key(number) for number in range(len(split))], config.data.num_classes)
    return ask(config, source, checkpoint, options.views)


def _source(config: Config, dataset: Dataset, options: argparse.Namespace) -> EvaluationSet:
    """The images that are asked about. Raises DataError."""
    from pipeline.data.evaluation_set import open_evaluation_set, own_images

    if not options.set:
        return own_images(dataset, config.data.num_classes)
    with Progress("packing", "images") as progress:
        return open_evaluation_set(
            options.set, dataset.manifest.classes, config.data.num_classes, location=dataset.location,
            workers=os.cpu_count() or 1, progress=progress, say=lambda text: _console(options).print(text),
        )  # fmt: skip


def _refuse_strangers(questions: list[Question]) -> None:
    """Raises ConfigError where runs of several were not trained on one data set."""
    from pipeline.config import ConfigError
    from pipeline.data.shards import MANIFEST, difference, read_manifest

    first, *others = (question.config for question in questions)
    for other in others:
        if other.data.digest != first.data.digest:
            known = all((config.directory / MANIFEST).is_file() for config in (first, other))
            what = "their digests differ"
            if known:
                what = difference(*(read_manifest(config.directory) for config in (first, other)))
            raise ConfigError(f"{first.directory} and {other.directory} are of different data sets ({what}); an "
                              "ensemble needs one")  # fmt: skip
        if other.data.num_classes != first.data.num_classes:
            raise ConfigError(
                f"data.num_classes = {first.data.num_classes} in {first.directory} and {other.data.num_classes} in "
                f"{other.directory}; an ensemble needs the same classes"
            )


def _answer(question: Question, options: argparse.Namespace, overrides: list[str]) -> int:
    """Evaluate one run, here or by processes of its own."""
    from pipeline.launch.failure import AGAIN, FailedRunError
    from pipeline.launch.local import LAUNCHER
    from pipeline.launch.lock import locked
    from pipeline.run.evaluating import evaluate
    from pipeline.world import World

    config, world = question.config, World.from_environment()
    if World.is_launched():
        agree(config, world)
    if os.environ.get(LAUNCHER) or not world.leads:  # who started it, or leads, holds the directory
        evaluate(question, world, _console(options))
        return DONE
    with locked(question.directory):
        if config.world == world.size or question.is_answered:  # no process is needed to put it together
            evaluate(question, world, _console(options))
            return DONE
        words = ["evaluate", str(config.directory), "--checkpoint", str(question.checkpoint), "--views",
                 str(question.views), *(["--set", options.set] if options.set else []),
                 *(["--json"] if options.json else []), *overrides]  # fmt: skip
        try:
            return launch_here(config, words)
        except FailedRunError as failure:
            if failure.code != AGAIN:
                raise
            kept = f"{failure}; what is evaluated is kept in {question.directory}, and the same command goes on"
            raise FailedRunError(kept, code=AGAIN) from None


def _shows() -> bool:
    """Whether this process says what came out: of several the leading one, or the one that started them."""
    from pipeline.launch.local import LAUNCHER
    from pipeline.world import World

    return World.from_environment().leads and not os.environ.get(LAUNCHER)


def _console(options: argparse.Namespace) -> Console:
    """For what is said on the way; with --json it does not mix with what comes out."""
    from rich.console import Console

    from pipeline.world import World

    return Console(quiet=not World.from_environment().leads, stderr=options.json)


def _show(question: Question, options: argparse.Namespace) -> None:
    from rich.console import Console

    from pipeline.cli.judgement import make_page, shares
    from pipeline.evaluation.metrics import Scores
    from pipeline.run.reports import beside, table

    scores, judge = question.scores(), _judge(options)
    predictions = question.results().predictions
    assert scores is not None
    assert predictions is not None
    predictions = judge.seen(predictions, question)
    truth = judge.truth(predictions)
    if not judge.is_plain:
        top1, top5, images = shares(predictions, truth)
        scores |= {"top1": top1.value, "top1_interval": [top1.low, top1.high], "top5": top5.value,
                   "top5_interval": [top5.low, top5.high], "images": images}  # fmt: skip
        scores |= {"labels": str(options.labels)} if options.labels else {}
        for name in ("loss", "running_averages"):  # of the labels and classes that the run was trained with
            scores.pop(name, None)
    if not options.no_page:
        scores["page"] = str(make_page(
            _title(question), question, predictions, truth, question.directory / judge.name,
            command=shlex.join(["pipeline", *options.arguments]), facts=[("step", f"{question.step:,}")],
        ))  # fmt: skip
    if options.json:
        print(json.dumps(scores))
        return

    def share(name: str) -> str:
        low, high = scores[f"{name}_interval"]
        return f"{scores[name]:.2%}  (95 %: {low:.2%} to {high:.2%})"

    left_out = f", {scores['left_out']} left out" if scores["left_out"] else ""
    views = f"{scores['views']} views" if scores["views"] > 1 else "1 view"
    Console().print(table(f"evaluation of {question.config.run.id}", {
        "checkpoint": f"{scores['checkpoint']} (step {scores['step']})",
        "images": f"{scores['images']:,}, {views} of each{left_out}",
        "top-1": share("top1"), "top-5": share("top5"),
        **({"loss": f"{scores['loss']:.4f}"} if "loss" in scores else {}),
        **({"classes": question.source.remark} if question.source.remark else {}),
        **({"labels": scores["labels"]} if "labels" in scores else {}),
        "statistics": scores["statistics"],
        **beside(Scores(**scores["running_averages"]) if "running_averages" in scores else None),
        "results": scores["results"],
    }))  # fmt: skip
    if "page" in scores:
        Console().print(f"page: {scores['page']}", highlight=False, soft_wrap=True)


def _judge(options: argparse.Namespace) -> Judge:
    from pipeline.cli.judgement import Judge

    return Judge(options.labels, options.within)


def _title(question: Question) -> str:
    source, run = question.source, question.config.run.id
    return f"{run} on {source.name}" if not source.is_own else run


def _compare(questions: list[Question], options: argparse.Namespace) -> None:
    """The members beside their mean: a table, ensemble.json, and what the ensemble says of each image."""
    from rich.console import Console

    from pipeline.cli.judgement import make_page
    from pipeline.run.ensembles import compare_members, keep, place_of, rows_of, table_of

    judge = _judge(options)
    comparison = compare_members(questions, judge.seen, None if judge.is_plain else judge.truth)
    directory = options.output or place_of(questions)
    facts = keep(comparison, questions, directory)
    if not options.no_page:
        facts["page"] = str(make_page(
            f"ensemble of {len(questions)}: {_title(questions[0])} and others", questions[0], comparison.predictions,
            judge.truth(comparison.predictions), directory / judge.name,
            command=shlex.join(["pipeline", *options.arguments]), members=rows_of(facts), notes=facts["said"],
        ))  # fmt: skip
    if options.json:
        print(json.dumps(facts))
        return
    console = Console()
    console.print(table_of(facts))
    for line in facts["said"]:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"written to {directory}", highlight=False, soft_wrap=True)
    if "page" in facts:
        console.print(f"page: {facts['page']}", highlight=False, soft_wrap=True)
