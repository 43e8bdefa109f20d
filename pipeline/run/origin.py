"""Where a network comes from: what a model card says of the run behind it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.callbacks.journal import read_journal
from pipeline.config import Config
from pipeline.data.shards import file_sha256
from pipeline.launch.code_state import code_state
from pipeline.launch.plan import STARTED, read_record
from pipeline.run.reports import statistics_used
from pipeline.training.soup import SOUP

UNKNOWN = "not known; `pipeline evaluate` measures it"


def origin(config: Config, checkpoint: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Run, recipe, statistics, scores, data, code and versions behind a checkpoint, for people. state: all of it."""
    packages = ("torch", "torchvision", "onnx", "onnxruntime", "safetensors", "pipeline")
    versions = {name: version for name in packages if (version := _version(name))}
    return {
        "run": config.run.id, "recipe": config.run.recipe,
        "checkpoint": f"{checkpoint.name}, step {state['global_step']:,}",
        "statistics": statistics_used(config, state), "validation": _scores(config, checkpoint, state),
        "data": config.run.data, "data digest": config.data.digest, "seed": config.seed,
        "precision in training": config.trainer.precision,
        "code": f"{_trained_by(config.directory)}, written by {code_state().digest}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items())
                    + f", Python {platform.python_version()}",
    }  # fmt: skip


def _trained_by(directory: Path) -> str:
    """The code of the run's last start, by its digest."""
    starts = read_record(directory).starts
    return str(starts[-1].get("code", "not known")) if starts else "not known"


def _scores(config: Config, checkpoint: Path, state: Mapping[str, Any]) -> str:
    """What is known of these weights: their last evaluation with such statistics, else what they scored as they arose.

    A step does not tell weights: averaged ones have that of their newest member.
    """
    if evaluated := _evaluated(config, checkpoint, state):
        return evaluated
    if SOUP in state:
        return _averaged(state[SOUP])
    is_its = checkpoint.resolve().is_relative_to(config.directory.resolve())
    return (_validated(config.directory, state["global_step"]) if is_its else "") or UNKNOWN


def _evaluated(config: Config, checkpoint: Path, state: Mapping[str, Any]) -> str:
    try:
        found = json.loads((config.directory / "evaluation.json").read_text())
        wanted = {"checkpoint_sha256": file_sha256(checkpoint), "statistics": statistics_used(config, state)}
        if any(found[name] != value for name, value in wanted.items()):
            return ""
        views = found.get("views", 1)
        seen = f"{found['images']:,} images, {views} view{'' if views == 1 else 's'} each"
        return f"top-1 {found['top1']:.2%}, top-5 {found['top5']:.2%} of {seen}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _averaged(soup: Mapping[str, Any]) -> str:
    """What `pipeline average` found, beside the members' scores."""
    name = f"average of {len(soup['members'])}"
    row = next((row for row in soup["scores"] if row["network"] == name), None)
    if row is None:
        return UNKNOWN
    return f"top-1 {row['top1']:.2%}, top-5 {row['top5']:.2%} of {row['images']:,} images, when it was averaged"


def _validated(directory: Path, step: int) -> str:
    """The run's validation after that step, or else its last one."""
    try:
        rows = [row for row in read_journal(directory / STARTED) if row.split == "val"]
    except OSError:
        rows = []
    if not rows:
        return ""
    row = next((row for row in reversed(rows) if row.step == step), rows[-1])
    return f"top-1 {row.top1:.2%}, top-5 {row.top5:.2%} after step {row.step:,}, by its {STARTED}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
