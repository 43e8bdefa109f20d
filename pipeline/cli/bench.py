"""pipeline bench: measure this machine, ours beside others."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.cli.codes import DONE, FAILED
from pipeline.cli.options import add_verb, count, none_or_more, repeats
from pipeline.cli.progress import Progress


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = add_verb(
        verbs, "stream", stream, "images per CPU second of decoding and of the whole stream, ours and the peers'",
        "pipeline bench stream shards/imagenet --repeats 7 --csv stream.csv\n"
        "  peers that are not installed are left out: pip install -r requirements/peers.txt",
    )  # fmt: skip
    p.add_argument("root", help="directory of shards, ours or anybody's")
    p.add_argument("--images", type=count, default=500, metavar="N", help="a round (default: 500)")
    p.add_argument("--repeats", type=repeats, default=5, metavar="N", help="rounds, 5 or more (default: 5)")
    p.add_argument("--size", type=count, default=224, metavar="N", help="pixels a side (default: 224)")
    p.add_argument("--batch", type=count, default=64, metavar="N", help="images a batch (default: 64)")
    p.add_argument("--split", default="train", help="default: train")
    p.add_argument("--only", type=lambda names: names.split(","), default=[], metavar="NAME,NAME",
                   help="these contenders alone, by the names in the tables")  # fmt: skip
    p.add_argument("--csv", metavar="FILE", help="write every round there")

    p = add_verb(verbs, "epochs", epochs, "images a second and memory, epoch by epoch: neither may drift",
                 "pipeline bench epochs shards/cifar10 --size 24 --workers 1 2")  # fmt: skip
    p.add_argument("root", help="directory of shards")
    p.add_argument("--epochs", type=count, default=5, metavar="N", help="default: 5")
    _add_loading(p)

    p = add_verb(verbs, "start", start, "seconds to the first batch, at the beginning of an epoch and late in it",
                 "pipeline bench start shards/imagenet --samples 0 1200000")  # fmt: skip
    p.add_argument("root", help="directory of shards")
    p.add_argument("--samples", type=none_or_more, nargs="+", default=[0], metavar="N", help="places")
    p.add_argument("--repeats", type=repeats, default=5, metavar="N", help="starts each (default: 5)")
    _add_loading(p)
    _add_training(verbs)


def _add_training(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = add_verb(
        verbs, "norm", norm, "what synchronized statistics cost BN-Inception, ours beside torch's form",
        "pipeline bench norm --processes 4 --images 4 --size 128\n"
        "  pipeline bench norm --device cuda --processes 1 --images 256 --size 224 --layers 256\n"
        "  torchrun --nproc-per-node 4 -m pipeline bench norm    # in a group that is there already",
    )  # fmt: skip
    p.add_argument("--processes", type=count, default=2, metavar="N", help="on this machine (default: 2)")
    p.add_argument("--images", type=count, default=4, metavar="N", help="on a rank (default: 4)")
    p.add_argument("--size", type=count, default=128, metavar="N", help="pixels a side (default: 128)")
    p.add_argument("--width", type=float, default=1.0, metavar="F", help="of the network (default: 1)")
    p.add_argument("--repeats", type=repeats, default=10, metavar="N", help="steps of each form (default: 10)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    p.add_argument(
        "--layers",
        type=none_or_more,
        default=0,
        metavar="N",
        help="a second table: each layer's BN + ReLU on N images, ours and torch's (default: 0, none)",
    )
    p.add_argument("--only", type=lambda names: names.split(","), default=[], metavar="NAME,NAME",
                   help="these forms alone, by the names in the table")  # fmt: skip

    p = add_verb(verbs, "step", step, "what checkpoints, tracking, looks, determinism and the like add to a step",
                 "pipeline bench step runs/first --processes 1 2")  # fmt: skip
    p.add_argument("run", help="a run's directory, of which config.yaml is taken")
    p.add_argument("--only", type=lambda names: names.split(","), default=[], metavar="NAME,NAME",
                   help="of checkpoints, agreement, tracking, clocks, system, norms, percentiles, gradients, "
                   "deterministic, these alone; reporting is tracking, clocks and system at once, watching is norms, "
                   "percentiles and gradients")  # fmt: skip
    p.add_argument("--processes", type=count, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    p.add_argument("--steps", type=count, default=20, metavar="N", help="a block (default: 20)")
    p.add_argument("--pairs", type=repeats, default=20, metavar="N", help="of blocks with and without (default: 20)")
    p.add_argument("--work", metavar="DIR", help="where the copies run (default: step-RUN beside it)")
    p.add_argument("--cpu-time", action="store_true", help="count CPU seconds of rank 0 instead of the clock's: on a "
                   "machine that does other work")  # fmt: skip

    p = add_verb(verbs, "chaos", chaos, "kill copies of a run at random moments and compare them with one left alone",
                 "pipeline bench chaos runs/small --kills 20 --processes 1 2 --variant norm.group_size=1")  # fmt: skip
    p.add_argument("run", help="a run's directory, of which config.yaml is taken; a short run serves best")
    p.add_argument("--kills", type=count, default=10, metavar="N", help="interruptions (default: 10)")
    p.add_argument("--seed", type=int, default=0, help="of moments, signals and ranks")
    p.add_argument("--processes", type=count, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    p.add_argument("--variant", action="append", default=[], metavar="KEY=VALUE,KEY=VALUE",
                   help="a run with these keys as well as the run as it is; may be repeated")  # fmt: skip
    p.add_argument("--work", metavar="DIR", help="where the copies run (default: chaos-RUN beside it)")


def stream(options: argparse.Namespace) -> int:
    from rich.console import Console

    from pipeline.benchmarks.stream import NAMES, compare, report, write_csv
    from pipeline.config import ConfigError
    from pipeline.data.dataset import Location, open_dataset

    unknown = [name for name in options.only if name not in NAMES]
    if unknown:
        raise ConfigError(f"--only {unknown[0]} is no contender; choose from {', '.join(NAMES)}")
    with Progress("measuring", "rounds") as progress:
        result = compare(
            open_dataset(Location(options.root)), split=options.split, images=options.images, rounds=options.repeats,
            size=options.size, batch=options.batch, only=options.only, progress=progress,
        )  # fmt: skip
    report(result, Console(width=None if sys.stdout.isatty() else 140))
    if options.csv:
        write_csv(result, Path(options.csv))
    return DONE


def epochs(options: argparse.Namespace) -> int:
    from rich.console import Console

    from pipeline.benchmarks import epochs as table
    from pipeline.data.dataset import Location, open_dataset

    dataset = open_dataset(Location(options.root))
    passes = []
    with Progress("reading", "epochs") as progress:
        for workers in options.workers:
            for each in table.epochs(
                dataset, workers=workers, count=options.epochs, size=options.size, batch=options.batch
            ):
                passes.append(each)
                progress(len(passes), options.epochs * len(options.workers))
    Console().print(table.report(passes))
    return DONE


def start(options: argparse.Namespace) -> int:
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
    with Progress("starting", "starts") as progress:
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


def norm(options: argparse.Namespace) -> int:
    import torch
    import torch.distributed as dist
    from rich.console import Console

    from pipeline.benchmarks import layers
    from pipeline.benchmarks import norm as table
    from pipeline.config import ConfigError
    from pipeline.launch.local import run_processes

    unknown = [name for name in options.only if name not in table.FORMS]
    if unknown:
        raise ConfigError(f"--only {unknown[0]} is no form; choose from {', '.join(table.FORMS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch finds no CUDA device; use cpu")
    if options.layers == 1 and options.size <= layers.ONE_PIXEL:
        raise ConfigError(
            f"--layers 1 of {options.size} pixels a side leaves one value a channel in the last layers, which torch "
            "refuses; give 2 or more"
        )
    device = torch.device(options.device)
    if not table.join(options.processes, device):
        with TemporaryDirectory() as logs:
            return run_processes(options.arguments, processes=options.processes, threads=1, logs=Path(logs))
    console = Console(width=None if sys.stdout.isatty() else 160)
    is_leading = dist.get_rank() == 0
    with Progress("training", "steps", quiet=not is_leading) as progress:
        forms = table.compare(
            images=options.images, size=options.size, repeats=options.repeats, width=options.width, only=options.only,
            device=device, progress=progress,
        )  # fmt: skip
    if is_leading:
        console.print(table.report(forms))
    if is_leading and options.layers:
        dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        with Progress("measuring", "shapes") as progress:
            found = layers.measure(
                images=options.layers, size=options.size, dtype=dtype, device=device, repeats=options.repeats,
                progress=progress,
            )  # fmt: skip
        console.print(layers.report(found, images=options.layers, dtype=dtype))
        if reason := layers.why_not_compiled(device):
            print(f"{layers.COMPILED} is left out: {reason}", file=sys.stderr)
    dist.barrier()
    dist.destroy_process_group()
    return DONE


def step(options: argparse.Namespace) -> int:
    from rich.console import Console

    from pipeline.benchmarks import step as table
    from pipeline.config import ConfigError

    unknown = [name for name in options.only if name not in table.FEATURES]
    if unknown:
        raise ConfigError(f"--only {unknown[0]} is no feature; choose from {', '.join(table.FEATURES)}")
    frozen = _frozen(options.run)
    work = Path(options.work or frozen.parent / f"step-{frozen.name}")
    with Progress("measuring", "features") as progress:
        found = table.costs(
            frozen, work, features=options.only or table.FEATURES, worlds=options.processes, steps=options.steps,
            pairs=options.pairs, cpu_time=options.cpu_time, progress=progress,
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 140).print(table.report(found))
    return DONE


def chaos(options: argparse.Namespace) -> int:
    from pipeline.benchmarks import chaos as harness

    frozen = _frozen(options.run)
    work = Path(options.work or frozen.parent / f"chaos-{frozen.name}")
    with Progress("killing", "kills") as progress:
        report = harness.chaos(
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
    verdict = f"{len(report.differences)} differences, see {work}" if report.differences else "the same, bit for bit"
    print(f"{harness.summary(report)}: {verdict}")
    return FAILED if report.differences else DONE


def _frozen(run: str) -> Path:
    """The directory of a run. Raises ConfigError."""
    from pipeline.config import ConfigError
    from pipeline.launch.plan import CONFIG

    if not (Path(run) / CONFIG).is_file():
        raise ConfigError(f"{run} is no run: it holds no {CONFIG}; give a directory like runs/NAME")
    return Path(run)


def _add_loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=none_or_more, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument("--size", type=count, default=224, metavar="N", help="pixels a side (default: 224)")
    parser.add_argument("--batch", type=count, default=128, metavar="N", help="images a batch (default: 128)")
