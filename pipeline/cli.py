"""The verbs of the product, one function each. Heavy imports wait inside a verb, so that --help answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.data.dataset import Dataset
    from pipeline.data.description import SplitFacts
    from pipeline.launch.failure import FailedRunError
    from pipeline.world import World

DONE, FAILED, USAGE, BAD_DATA, RESUMABLE = 0, 1, 2, 3, 75


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 2 usage or config, 3 data, 75 interrupted and resumable, 1 other."""
    options = _parsed(arguments)
    verb: Callable[[argparse.Namespace], int] = options.verb
    try:
        return verb(options)
    except KeyboardInterrupt:
        goes_on = verb in (train, shards_write)
        print(f"pipeline: interrupted{'; the same command goes on from there' if goes_on else ''}", file=sys.stderr)
        return RESUMABLE if goes_on else FAILED
    except Exception as error:
        code = _code_of(error)
        if code is None:
            raise
        if code == RESUMABLE and verb is evaluate:
            code = FAILED  # nothing is kept of an evaluation
        print(f"pipeline: {_line_of(error)}", file=sys.stderr)
        return code


def train(options: argparse.Namespace) -> int:
    from pipeline.config import ConfigError, compose_config, to_yaml
    from pipeline.world import World

    if World.is_launched():  # one process of several: the config is frozen
        return _train_launched(_of_run(_frozen(options.words)))
    files = [word for word in options.words if word.endswith((".yaml", ".yml")) and "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"{files[1]} is a second config; give one RUN/config.yaml, and key=value behind it")
    overrides = [word for word in options.words if word not in files]
    config = _of_run(Path(files[0]), overrides) if files else compose_config(overrides)
    if options.print_config:
        print(to_yaml(config), end="")
        return DONE
    from pipeline.data.shards import MANIFEST, write_atomically
    from pipeline.launch.failure import FailedRunError
    from pipeline.launch.lock import locked
    from pipeline.launch.plan import CONFIG, named, open_run

    config, dataset = settle(config)
    config = named(config)
    with locked(config.directory):
        while True:
            config = open_run(config)
            write_atomically(config.directory / MANIFEST, (dataset.directory / MANIFEST).read_bytes())
            words = ["train", str(config.directory / CONFIG)]
            try:
                if config.world == 1:
                    return _noted(config, lambda: _train_here(config))  # noqa: B023  (called at once)
                return _noted(config, lambda: _launch_here(config, words, dataset))  # noqa: B023
            except FailedRunError as failure:
                if not failure.restart:
                    raise _with_way_on(failure, config) from None
                print(f"pipeline: {failure}", file=sys.stderr)


def evaluate(options: argparse.Namespace) -> int:
    from rich.console import Console

    from pipeline.config import ConfigError
    from pipeline.launch.plan import CONFIG
    from pipeline.world import World

    directory = Path(options.run)
    if not (directory / CONFIG).is_file():
        raise ConfigError(f"{directory} is no run: it holds no {CONFIG}; give a directory like runs/NAME")
    config = settled(_of_run(directory / CONFIG, options.words))
    checkpoint = _checkpoint(directory, options.checkpoint)
    if config.world > 1 and not World.is_launched():
        words = ["evaluate", str(directory), "--checkpoint", str(checkpoint), *options.words]
        return _launch_here(config, words)
    from pipeline import run

    world = World.from_environment()
    _agree(config, world)
    run.evaluate(config, world, Console(quiet=not world.leads), checkpoint=checkpoint)
    return DONE


def sync(options: argparse.Namespace) -> int:
    from pipeline.callbacks.sync import synchronize
    from pipeline.callbacks.wandb_reporter import WandbPlace
    from pipeline.config import ConfigError
    from pipeline.launch.lock import locked
    from pipeline.launch.plan import CONFIG, RECORD, read_record

    directory = Path(options.run)
    if not ((directory / CONFIG).is_file() and (directory / RECORD).is_file()):
        raise ConfigError(f"{directory} is no run: it holds no {CONFIG}; give a directory like runs/NAME")
    config, record = _of_run(directory / CONFIG), read_record(directory)
    place = WandbPlace(
        id=record.wandb_id, name=config.run.id, project=config.tracking.project, entity=config.tracking.entity,
        group=config.tracking.group, tags=config.tracking.tags,
    )  # fmt: skip
    ended = record.starts[-1].get("ended") if record.starts else None
    code = {"done": DONE, "interrupted": RESUMABLE}.get(str(ended), FAILED)
    with locked(directory):  # the segment of a run that goes on is still being written
        synchronize(directory, place, seconds=options.timeout, exit_code=code)
    return DONE


def shards_write(options: argparse.Namespace) -> int:
    from pipeline.data.writer import write_shards

    with _progress("writing", "images") as progress:
        manifest = write_shards(
            options.source,
            Path(options.root),
            samples_per_shard=options.samples_per_shard,
            workers=options.workers,
            seed=options.seed,
            holdout=options.holdout,
            shorter_side=options.shorter_side,
            quality=options.quality,
            progress=progress,
        )
    for split in manifest.splits:
        print(f"{options.root}: {split}: {manifest.count(split):,} images in {len(manifest.splits[split])} shards")
    print(f"{len(manifest.classes)} classes; digest {manifest.digest[:16]}")
    return DONE


def shards_verify(options: argparse.Namespace) -> int:
    from pipeline.data.verification import verify

    dataset = _dataset(options)
    with _progress("verifying", "images") as progress:
        report = verify(dataset, decode_images=options.decode, workers=options.workers, progress=progress)
    for fault in report.faults:
        print(fault, file=sys.stderr)
    verdict = f"{len(report.faults)} faults" if report.faults else "sound"
    print(
        f"{options.root}: {report.samples:,} images in {report.shards} shards, {report.bytes / 1e6:,.1f} MB: {verdict}"
    )
    return BAD_DATA if report.faults else DONE


def shards_describe(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from pipeline.data.description import contact_sheet, describe
    from pipeline.data.order import SORTED
    from pipeline.data.shards import DataError

    dataset = _dataset(options)
    manifest, facts = dataset.manifest, describe(dataset)
    table = Table("", *facts)
    rows: list[tuple[str, Callable[[SplitFacts], str]]] = [
        ("images", lambda f: f"{f.samples:,}"),
        ("shards", lambda f: f"{f.shards:,}"),
        ("MB of images", lambda f: f"{f.bytes_total / 1e6:,.1f}"),
        ("bytes an image", lambda f: f"{f.bytes_mean:,.0f}"),
        ("images a class", lambda f: f"{f.class_fewest:,} to {f.class_most:,}"),
        ("width", lambda f: _spread(f.width)),
        ("height", lambda f: _spread(f.height)),
        ("mixing of shards", lambda f: f"{f.mixing:.2f}"),
    ]
    for name, value in rows:
        table.add_row(name, *map(value, facts.values()))
    console = Console()
    console.print(table)
    names = [c.name for c in manifest.classes]
    print(f"{len(names)} classes: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}")
    print(f"digest {manifest.digest}")
    split = options.split or next(iter(sorted(manifest.splits)))
    if split not in manifest.splits:
        raise DataError(f"--split {split} is not there; {options.root} holds {sorted(manifest.splits)}")
    path = Path(options.sheet or f"{Path(options.root).name}-{split}.png")
    contact_sheet(dataset, split).save(path)
    print(f"contact sheet of {split}: {path}")
    if any(f.mixing < SORTED and f.shards > 1 for f in facts.values()):
        print(f"mixing below {SORTED}: shards are sorted by class; data.window=0 shuffles over all of them")
    return DONE


def shards_index(options: argparse.Namespace) -> int:
    with _progress("indexing", "shards") as progress:
        dataset = _dataset(options, again=True, progress=progress)
    for split, entries in dataset.manifest.splits.items():
        print(f"{options.root}: {split}: {dataset.manifest.count(split):,} images in {len(entries)} shards")
    print(f"{len(dataset.manifest.classes)} classes; digest {dataset.manifest.digest[:16]}")
    return DONE


def bench_stream(options: argparse.Namespace) -> int:
    from rich.console import Console

    from pipeline.benchmarks.stream import NAMES, compare, report, write_csv
    from pipeline.config import ConfigError
    from pipeline.data.dataset import Location, open_dataset

    unknown = [name for name in options.only if name not in NAMES]
    if unknown:
        raise ConfigError(f"--only {unknown[0]} is no contender; choose from {', '.join(NAMES)}")
    with _progress("measuring", "rounds") as progress:
        result = compare(
            open_dataset(Location(options.root)), split=options.split, images=options.images, rounds=options.repeats,
            size=options.size, batch=options.batch, only=options.only, progress=progress,
        )  # fmt: skip
    report(result, Console(width=None if sys.stdout.isatty() else 140))
    if options.csv:
        write_csv(result, Path(options.csv))
    return DONE


def _dataset(options: argparse.Namespace, **how: Any) -> Dataset:
    """The data set that a verb of `shards` is about."""
    from pipeline.data.dataset import Location, open_dataset

    cache_bytes = int(options.cache_gb * 1e9)
    location = Location(options.root, options.train or "", options.val or "", options.cache or "", cache_bytes)
    return open_dataset(location, workers=getattr(options, "workers", 1), patient=False, **how)


def bench_epochs(options: argparse.Namespace) -> int:
    from rich.console import Console

    from pipeline.benchmarks.epochs import epochs, report
    from pipeline.data.dataset import Location, open_dataset

    dataset = open_dataset(Location(options.root))
    passes = []
    with _progress("reading", "epochs") as progress:
        for workers in options.workers:
            for each in epochs(dataset, workers=workers, count=options.epochs, size=options.size, batch=options.batch):
                passes.append(each)
                progress(len(passes), options.epochs * len(options.workers))
    Console().print(report(passes))
    return DONE


def bench_start(options: argparse.Namespace) -> int:
    from rich.console import Console

    from pipeline.benchmarks.start import report, starts
    from pipeline.config import ConfigError
    from pipeline.data.dataset import Location, open_dataset

    dataset = open_dataset(Location(options.root))  # indexed, if need be, before anything is timed
    epoch = dataset.manifest.count("train") // options.batch * options.batch
    if max(options.samples) >= epoch:
        raise ConfigError(
            f"--samples {max(options.samples)}: an epoch has {epoch} in batches of {options.batch}; lower it"
        )
    with _progress("starting", "starts") as progress:
        found = starts(
            options.root,
            samples=options.samples,
            workers=options.workers,
            repeats=options.repeats,
            size=options.size,
            batch=options.batch,
            progress=progress,
        )
    Console().print(report(found))
    return DONE


def bench_chaos(options: argparse.Namespace) -> int:
    from pipeline.benchmarks.chaos import chaos
    from pipeline.config import ConfigError
    from pipeline.launch.plan import CONFIG

    frozen = Path(options.run)
    if not (frozen / CONFIG).is_file():
        raise ConfigError(f"{frozen} is no run: it holds no {CONFIG}; give a directory like runs/NAME")
    work = Path(options.work or frozen.parent / f"chaos-{frozen.name}")
    with _progress("killing", "kills") as progress:
        report = chaos(
            frozen,
            work,
            worlds=options.processes,
            kills=options.kills,
            seed=options.seed,
            variants=[[], *(variant.split(",") for variant in options.variant)],
            progress=progress,
        )
    for difference in report.differences:
        print(difference, file=sys.stderr)
    killed = sum(kill.signal == "SIGKILL" for kill in report.kills)
    verdict = f"{len(report.differences)} differences, see {work}" if report.differences else "the same, bit for bit"
    print(f"{report.runs} runs, {killed} times SIGKILL and {len(report.kills) - killed} times SIGTERM: {verdict}")
    return FAILED if report.differences else DONE


def _of_run(path: Path, overrides: Sequence[str] = ()) -> Config:
    """A frozen config. One that lies in its run's directory belongs to that directory, wherever it was moved."""
    from pipeline.config import completed, read_config
    from pipeline.launch.plan import RECORD

    config = read_config(path, overrides)
    if (path.parent / RECORD).is_file():
        config = completed(config, run={"dir": str(path.parent.parent), "id": path.parent.name})
    return config


def settled(config: Config) -> Config:
    """The config with what its data set decides."""
    return settle(config)[0]


def settle(config: Config) -> tuple[Config, Dataset]:
    """The data set, packed or indexed on first use, and the config with what it decides: classes, digest."""
    from pipeline.config import ConfigError, completed
    from pipeline.data.dataset import Location
    from pipeline.data.decode import DECODER
    from pipeline.data.preparation import ready_data
    from pipeline.data.read_ahead import check_room
    from pipeline.data.shards import MANIFEST, DataError, difference, read_manifest

    data = config.data
    with _progress("indexing", "shards") as progress:
        dataset = ready_data(
            Location(*data.location), source=data.source, workers=os.cpu_count() or 1, progress=progress,
            patient=bool(data.digest),  # a run that has begun waits for its server; who has mistyped a host does not
        )  # fmt: skip
    manifest = dataset.manifest
    if data.digest and data.digest != manifest.digest:
        known = (config.directory / MANIFEST).is_file()
        what = difference(read_manifest(config.directory), manifest) if known else "its digest differs"
        raise DataError(
            f"data.root = {data.root} holds another data set than this run began with ({what}); bring that one back"
        )
    if data.global_batch_size > manifest.count("train"):
        raise ConfigError(
            f"data.global_batch_size = {data.global_batch_size} exceeds the {manifest.count('train')} training images; "
            "lower it"
        )
    if dataset.cache is not None:
        check_room(dataset.cache.limit, manifest.splits["train"], data.window)
    classes = data.num_classes or len(manifest.classes)
    for split in ("train", "val"):  # labels within the classes
        dataset.split(split, classes)
    if config.model.name not in (
        "bn_inception",
        "inception",
    ):  # torchvision's list takes seconds
        from pipeline.models.registry import check_name

        try:
            check_name(config.model.name)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return completed(
        config, data={"num_classes": classes, "digest": manifest.digest, "decoder": data.decoder or DECODER}
    ), dataset


def _train_here(config: Config) -> int:
    from rich.console import Console

    from pipeline import run
    from pipeline.callbacks.preemption import InterruptedRunError
    from pipeline.launch.failure import FailedRunError, leave_verdict
    from pipeline.world import World

    world = World.from_environment()
    _agree(config, world)
    try:
        run.train(config, world, Console(quiet=not world.leads))
    except InterruptedRunError as interruption:
        if world.leads:
            print(
                f"pipeline: {interruption}; go on with: pipeline train {config.directory}/config.yaml", file=sys.stderr
            )
        return RESUMABLE
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
    return FailedRunError(
        f"{failure}; go on {begin} with: pipeline train {config.directory}/config.yaml", code=failure.code
    )


def _train_launched(config: Config) -> int:
    """One rank. Where another launcher than ours started it, the leading one holds the directory and keeps run.json."""
    from pipeline.launch.local import LAUNCHER
    from pipeline.launch.lock import locked
    from pipeline.world import World

    if os.environ.get(LAUNCHER) or not World.from_environment().leads:
        return _train_here(config)
    with locked(config.directory):
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
        close_run(config.directory, ended)


def _frozen(words: list[str]) -> Path:
    from pipeline.config import ConfigError

    if len(words) != 1 or not words[0].endswith((".yaml", ".yml")):
        raise ConfigError(
            f"a process started by a launcher (RANK is set) takes the frozen config alone, "
            f"not {' '.join(words) or 'none'}; give RUN/config.yaml, or unset RANK"
        )
    return Path(words[0])


def _agree(config: Config, world: World) -> None:
    """What the launcher started is what was asked for, or nothing starts."""
    from pipeline.config import ConfigError

    if world.size != config.world:
        raise ConfigError(
            f"cluster.nodes x cluster.devices = {config.world}, but the launcher started {world.size} processes; "
            "make them equal"
        )


def _launch_here(config: Config, arguments: list[str], dataset: Dataset | None = None) -> int:
    from pipeline.config import ConfigError
    from pipeline.launch.local import run_processes

    if config.cluster.nodes > 1:
        raise ConfigError(
            f"cluster.nodes = {config.cluster.nodes}: one machine cannot start several; "
            "start torchrun on every node with RUN/config.yaml, or set cluster.nodes=1"
        )
    return run_processes(
        arguments,
        processes=config.cluster.devices,
        threads=config.trainer.threads,
        logs=config.directory / "logs",
        lead_seconds=config.cluster.lead_seconds,
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


def _checkpoint(directory: Path, wanted: str) -> Path:
    from pipeline.config import ConfigError
    from pipeline.training.checkpoint import BEST, newest

    folder = directory / "checkpoints"
    path = newest(folder) if wanted == "newest" else folder / BEST if wanted == "best" else Path(wanted)
    if path is None or not path.is_file():
        raise ConfigError(f"--checkpoint {wanted}: there is none in {folder}; train first, or give a file")
    return path


class _progress:
    """A bar of images or shards done; called with (done, total)."""

    def __init__(self, what: str, unit: str):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(what, total=None)

    def __enter__(self) -> Callable[[int, int], None]:
        self._bar.start()
        return lambda done, total: self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _spread(values: tuple[int, int, int]) -> str:
    low, median, high = values
    return str(median) if low == high else f"{low} to {high}, median {median}"


def _code_of(error: Exception) -> int | None:
    """The exit code of an error that is the user's to mend, or None for one that is ours."""
    names = {kind.__name__ for kind in type(error).__mro__}  # by name: their modules may not be imported
    if isinstance(error, OSError) and error.filename is not None:
        return FAILED  # no space, no permission, no such place
    if "InterruptedRunError" in names:
        return FAILED  # of an evaluation: nothing is kept; `train` answers its own with 75
    if names & {"LockedError", "CheckpointError", "SyncError"}:
        return FAILED
    if "FailedRunError" in names:
        return int(error.code)  # type: ignore[attr-defined]
    return USAGE if "ConfigError" in names else BAD_DATA if "DataError" in names else None


def _line_of(error: Exception) -> str:
    """The message itself."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error).strip()


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line. Overrides may stand behind an option, too, where argparse stops looking."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    words: list[str] | None = getattr(options, "words", None)
    if rest and (words is None or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if words is not None:
        words.extend(rest)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pipeline",
        description="Distributed training in which an interrupted run is the same run.",
        epilog="example: pipeline train recipe=bn_x5 data=digits cluster.devices=2",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add(
        verbs, "train", train, "train a recipe on a data set, or go on with a run",
        "pipeline train recipe=bn_x5 data=cifar10 cluster.devices=2 run.id=first\n"
        "  pipeline train runs/first/config.yaml trainer.max_epochs=20",
        lambda p: (
            p.add_argument("words", nargs="*", metavar="key=value | RUN/config.yaml",
                           help="overrides of conf/config.yaml, or of a frozen config; --print-config lists all keys"),
            p.add_argument("--print-config", action="store_true", help="show the resolved config and stop"),
        ),
    )  # fmt: skip
    _add(
        verbs, "evaluate", evaluate, "score a run's checkpoint on the validation images",
        "pipeline evaluate runs/first --checkpoint best cluster.devices=2",
        lambda p: (
            p.add_argument("run", help="the run's directory"),
            p.add_argument("words", nargs="*", metavar="key=value", help="keys to change"),
            p.add_argument("--checkpoint", default="newest", help="newest, best, or a file (default: newest)"),
        ),
    )  # fmt: skip
    _add(
        verbs, "sync", sync, "send a run's offline segments to W&B, in order and each once, and rows that it lacks",
        "pipeline sync runs/first --timeout 120",
        lambda p: (
            p.add_argument("run", help="the run's directory"),
            p.add_argument("--timeout", type=_seconds, default=600.0, metavar="SECONDS", help="default: 600"),
        ),
    )  # fmt: skip
    _add_shards(verbs.add_parser("shards", help="pack images, index tars of others, check and look at them"))
    _add_bench(verbs.add_parser("bench", help="measure this machine, ours beside others"))
    return parser


def _add_bench(parser: argparse.ArgumentParser) -> None:
    bench = parser.add_subparsers(required=True, metavar="VERB")
    _add(
        bench, "stream", bench_stream, "images per CPU second of decoding and of the whole stream, ours and the peers'",
        "pipeline bench stream shards/imagenet --repeats 7 --csv stream.csv\n"
        "  peers that are not installed are left out: pip install pipeline[peers]",
        lambda p: (
            p.add_argument("root", help="directory of shards, ours or anybody's"),
            p.add_argument("--images", type=_count, default=500, metavar="N", help="a round (default: 500)"),
            p.add_argument("--repeats", type=_repeats, default=5, metavar="N", help="rounds, 5 or more (default: 5)"),
            p.add_argument("--size", type=_count, default=224, metavar="N", help="pixels a side (default: 224)"),
            p.add_argument("--batch", type=_count, default=64, metavar="N", help="images a batch (default: 64)"),
            p.add_argument("--split", default="train", help="default: train"),
            p.add_argument("--only", type=lambda names: names.split(","), default=[], metavar="NAME,NAME",
                           help="these contenders alone, by the names in the tables"),
            p.add_argument("--csv", metavar="FILE", help="write every round there"),
        ),
    )  # fmt: skip

    _add(
        bench, "epochs", bench_epochs, "images a second and memory, epoch by epoch: neither may drift",
        "pipeline bench epochs shards/cifar10 --size 24 --workers 1 2",
        lambda p: (
            p.add_argument("root", help="directory of shards"),
            p.add_argument("--epochs", type=_count, default=5, metavar="N", help="default: 5"),
            *_add_loading(p),
        ),
    )  # fmt: skip
    _add(
        bench, "start", bench_start, "seconds to the first batch, at the beginning of an epoch and late in it",
        "pipeline bench start shards/imagenet --samples 0 1200000",
        lambda p: (
            p.add_argument("root", help="directory of shards"),
            p.add_argument("--samples", type=_none_or_more, nargs="+", default=[0], metavar="N", help="places"),
            p.add_argument("--repeats", type=_repeats, default=5, metavar="N", help="starts each (default: 5)"),
            *_add_loading(p),
        ),
    )  # fmt: skip

    _add(
        bench, "chaos", bench_chaos, "kill copies of a run at random moments and compare them with one left alone",
        "pipeline bench chaos runs/small --kills 20 --processes 1 2 --variant norm.group_size=1",
        lambda p: (
            p.add_argument("run", help="a run's directory, of which config.yaml is taken; a short run serves best"),
            p.add_argument("--kills", type=_count, default=10, metavar="N", help="interruptions (default: 10)"),
            p.add_argument("--seed", type=int, default=0, help="of moments, signals and ranks"),
            p.add_argument("--processes", type=_count, nargs="+", default=[1, 2], metavar="N", help="default: 1 2"),
            p.add_argument("--variant", action="append", default=[], metavar="KEY=VALUE,KEY=VALUE",
                           help="a run with these keys as well as the run as it is; may be repeated"),
            p.add_argument("--work", metavar="DIR", help="where the copies run (default: chaos-RUN beside it)"),
        ),
    )  # fmt: skip


def _add_loading(parser: argparse.ArgumentParser) -> tuple[argparse.Action, ...]:
    return (
        parser.add_argument(
            "--workers", type=_none_or_more, nargs="+", default=[1, 2], metavar="N", help="default: 1 2"
        ),
        parser.add_argument("--size", type=_count, default=224, metavar="N", help="pixels a side (default: 224)"),
        parser.add_argument("--batch", type=_count, default=128, metavar="N", help="images a batch (default: 128)"),
    )


def _add_shards(parser: argparse.ArgumentParser) -> None:
    shards = parser.add_subparsers(required=True, metavar="VERB")
    _add(
        shards, "write", shards_write, "pack images into shards; goes on where it was stopped",
        "pipeline shards write cifar10.zip shards/cifar10 --workers 2",
        lambda p: (
            p.add_argument("source", help="class folders, a zip of them, ILSVRC2012 (tars, or Kaggle's tree), "
                                          "or Hugging Face's parquet files"),
            p.add_argument("root", help="directory for the shards"),
            p.add_argument("--samples-per-shard", type=_count, default=1000, metavar="N"),
            p.add_argument("--workers", type=_count, default=1, metavar="N", help="processes; the same bytes"),
            p.add_argument("--seed", type=int, default=0, help="of the order in the shards"),
            p.add_argument("--holdout", type=float, default=0.0, metavar="F",
                           help="without a val/ folder: the fraction of each class to validate on"),
            p.add_argument("--shorter-side", type=int, metavar="N",
                           help="re-encode larger images to N pixels on the shorter side (default: keep every byte)"),
            p.add_argument("--quality", type=int, metavar="Q",
                           help="with --shorter-side: of the JPEG, 1 to 100 (default: 90)"),
        ),
    )  # fmt: skip
    _add(
        shards, "verify", shards_verify, "read every byte again and name each fault",
        "pipeline shards verify shards/cifar10 --decode",
        lambda p: (
            *_add_location(p),
            p.add_argument("--decode", action="store_true", help="decode every image, too"),
            p.add_argument("--workers", type=_count, default=2, metavar="N", help="shards read at a time"),
        ),
    )  # fmt: skip
    _add(
        shards, "index", shards_index, "index tars of other makers, to train on them; anew if that was done",
        "pipeline shards index imagenet-1k-wds --workers 8",
        lambda p: (
            *_add_location(p),
            p.add_argument("--workers", type=_count, default=2, metavar="N", help="processes, a shard each"),
        ),
    )  # fmt: skip
    _add(
        shards, "describe", shards_describe, "counts, classes, sizes, and a contact sheet as PNG",
        "pipeline shards describe shards/cifar10 --sheet cifar10.png",
        lambda p: (
            *_add_location(p),
            p.add_argument("--split", help="of the contact sheet (default: the first)"),
            p.add_argument("--sheet", metavar="FILE", help="where to draw it (default: NAME-SPLIT.png here)"),
        ),
    )  # fmt: skip


def _add_location(parser: argparse.ArgumentParser) -> tuple[argparse.Action, ...]:
    return (
        parser.add_argument("root", help="directory or http(s), s3 or gs URL of the shards"),
        parser.add_argument(
            "--train", metavar="PATTERN", help="brace pattern or glob of the training shards below root"
        ),
        parser.add_argument("--val", metavar="PATTERN", help="the same of the validation shards"),
        parser.add_argument("--cache", metavar="DIR", help="for remote shards (default: ~/.cache/pipeline)"),
        parser.add_argument(
            "--cache-gb", type=_gigabytes, default=0.0, metavar="N", help="limit on remote shards kept there"
        ),
    )


def _gigabytes(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no size; 0 = no limit")
    return number


def _none_or_more(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} must be at least 0")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be more than 0 seconds")
    return number


def _repeats(text: str) -> int:
    number = int(text)
    if number < 5:
        raise argparse.ArgumentTypeError(f"{number} must be at least 5: fewer rounds show no spread")
    return number


def _add(verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, verb: Callable[..., int],
         purpose: str, example: str, arguments: Callable[[argparse.ArgumentParser], object]) -> None:  # fmt: skip
    parser = verbs.add_parser(
        name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.", epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    arguments(parser)
    parser.set_defaults(verb=verb)
