"""Where a network comes from: what a model card says of the run behind it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from pipeline.callbacks.journal import read_journal
from pipeline.config import Config
from pipeline.launch.code_state import code_state
from pipeline.launch.plan import STARTED, read_record
from pipeline.run.reports import statistics_used


def origin(config: Config, checkpoint: Path, step: int) -> dict[str, Any]:
    """Run, recipe, statistics, scores, data, code and versions behind a checkpoint, for people."""
    packages = ("torch", "torchvision", "onnx", "onnxruntime", "safetensors", "pipeline")
    versions = {name: version for name in packages if (version := _version(name))}
    return {
        "run": config.run.id, "recipe": config.run.recipe, "checkpoint": f"{checkpoint.name}, step {step:,}",
        "statistics": statistics_used(config), **_scores(config.directory, step),
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


def _scores(directory: Path, step: int) -> dict[str, str]:
    """What the run knows of these weights: an evaluation of this step, else its validation then, else its last one."""
    try:
        found = json.loads((directory / "evaluation.json").read_text())
        if found["step"] == step:
            views = found.get("views", 1)
            seen = f"{found['images']:,} images, {views} view{'' if views == 1 else 's'} each"
            return {"validation": f"top-1 {found['top1']:.2%}, top-5 {found['top5']:.2%} of {seen}"}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        rows = [row for row in read_journal(directory / STARTED) if row.split == "val"]
    except OSError:
        rows = []
    if not rows:
        return {"validation": "not known; `pipeline evaluate` measures it"}
    row = next((row for row in reversed(rows) if row.step == step), rows[-1])
    return {"validation": f"top-1 {row.top1:.2%}, top-5 {row.top5:.2%} after step {row.step:,}, by its {STARTED}"}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
