"""pipeline export: a run's network as a file for others, compared with what was trained before it is kept."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.cli.codes import DONE
from pipeline.cli.options import add_verb, count
from pipeline.cli.progress import Progress

FORMATS = ("safetensors", "torch-export", "onnx", "cadene")  # run/exporting.py's, which takes seconds to import
INPUTS = ("pixels", "normalized")


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = add_verb(verbs, "export", export, "a run's network as one file, norms folded, with a model card",
                 "pipeline export runs/first --format onnx --checkpoint best --speed\n"
                 "  pipeline export runs/first --format safetensors --keep-norms --output weights/first")  # fmt: skip
    p.add_argument("run", help="the run's directory")
    p.add_argument("words", nargs="*", metavar="key=value", help="keys to change: norm.precise_images=0 takes the "
                   "running averages instead of population statistics")  # fmt: skip
    p.add_argument("--format", choices=FORMATS, required=True, help="safetensors: tensors, for this package; "
                   "torch-export: a program for PyTorch; onnx: for any runtime; cadene: tensors under the names of "
                   "Cadene's and yjxiong's BN-Inception")  # fmt: skip
    p.add_argument("--checkpoint", default="newest", help="newest, best, or a file (default: newest)")
    p.add_argument("--output", metavar="DIR", help="where to write (default: export/FORMAT in the run's directory)")
    p.add_argument("--images", type=count, default=64, metavar="N", help="validation images that the file is compared "
                   "on with the trained network, before it is kept (default: 64)")  # fmt: skip
    p.add_argument("--input", choices=INPUTS, default="pixels", help="what a graph takes: uint8 pixels in RGB, which "
                   "it normalizes itself, or normalized float32 (default: pixels)")  # fmt: skip
    p.add_argument(
        "--keep-norms", action="store_true", help="do not fold them: safetensors that model.init can train on"
    )
    p.add_argument(
        "--speed", action="store_true", help="measure images a second beside eager PyTorch and torch.compile"
    )
    p.add_argument("--force", action="store_true", help="replace an export that is there")


def export(options: argparse.Namespace) -> int:
    from rich.console import Console

    from pipeline.cli.runs import checkpoint_of, of_run
    from pipeline.cli.settling import settled
    from pipeline.config import ConfigError
    from pipeline.launch.plan import CONFIG

    directory = Path(options.run)
    if not (directory / CONFIG).is_file():
        raise ConfigError(f"{directory} is no run: it holds no {CONFIG}; give a directory like runs/NAME")
    config = of_run(directory / CONFIG, options.words)
    checkpoint = checkpoint_of(directory, options.checkpoint)
    from pipeline.run import exporting

    request = exporting.Request(
        options.format, Path(options.output) if options.output else None, options.images, options.keep_norms,
        options.input, options.speed, options.force,
    )  # fmt: skip
    exporting.check(config, request)
    with Progress("exporting", "steps") as progress:
        exporting.export(settled(config), Console(), checkpoint=checkpoint, request=request, progress=progress)
    return DONE
