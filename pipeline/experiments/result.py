"""What an experiment left behind: its numbers, how and when they were measured, and what they say."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from pipeline.data.shards import write_atomically
from pipeline.experiments.experiment import Experiment, Finding, Measured, Setting
from pipeline.experiments.versions import fingerprint, versions

RESULT = "result.json"
_FORMAT = 2


@dataclass(frozen=True, slots=True)
class Result:
    """asked: what would make it another result. seconds: of measuring, without what an earlier call had done."""

    experiment: Experiment
    asked: Measured
    command: str
    date: str
    seconds: float
    machine: str
    versions: dict[str, str]
    measured: Measured
    finding: Finding


def asked(setting: Setting) -> Measured:
    """What a result depends on: another one of these, and it is measured anew."""
    return {
        "seeds": setting.seeds, "full": setting.full, "device": setting.device, "versions": versions(),
        "data": {page: [place, fingerprint(place)] for page, place in sorted(setting.data.items())},
    }  # fmt: skip


def kept(experiment: Experiment, setting: Setting, directory: Path) -> Result | None:
    """What was measured by the same request before."""
    known = read_result(experiment, directory)
    return known if known is not None and known.asked == asked(setting) else None


def measured(experiment: Experiment, setting: Setting, directory: Path, command: str) -> Result:
    """Measure, and keep the result in the directory. Raises as Experiment.measure does."""
    began = time.monotonic()
    found = experiment.measure(setting)
    directory.mkdir(parents=True, exist_ok=True)
    content: Measured = {
        "format": _FORMAT, "experiment": experiment.name, "claim": experiment.claim, "source": experiment.source,
        "asked": asked(setting), "command": command, "date": datetime.now(tz=UTC).date().isoformat(),
        "seconds": round(time.monotonic() - began, 1), "machine": _machine(setting.device),
        "measured": json.loads(json.dumps(found)),
    }  # fmt: skip
    finding = experiment.tell(content["measured"])
    content |= {"holds": finding.holds, "said": finding.said}
    write_atomically(directory / RESULT, json.dumps(content, indent=1).encode())
    return Result(experiment, content["asked"], command, content["date"], content["seconds"], content["machine"],
                  content["asked"]["versions"], content["measured"], finding)  # fmt: skip


def read_result(experiment: Experiment, directory: Path) -> Result | None:
    """What lies there, told as this version tells it; None where nothing does, or what this one cannot read."""
    path = directory / RESULT
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != _FORMAT or content["experiment"] != experiment.name:
            return None
        return Result(
            experiment, content["asked"], content["command"], content["date"], content["seconds"], content["machine"],
            content["asked"]["versions"], content["measured"], experiment.tell(content["measured"]),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):  # cut off, somebody's own, another version's
        return None


def _machine(device: str) -> str:
    cores = f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {cores}"
    return cores
