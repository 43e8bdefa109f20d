"""What a run is must stay when it is resumed; where it happens may change."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.config.schema import Config, by_key

# Where a run happens: may change when it is resumed. Everything else is what it is.
CIRCUMSTANCE = (
    "run.", "cluster.", "slurm.", "docker.", "skypilot.", "tracking.", "ledger", "data.root", "data.source",
    "data.micro_batch_size", "data.train", "data.val", "data.cache", "data.stage", "data.bad_samples",
    "trainer.max_epochs", "trainer.max_steps",
    "trainer.validate_every_epochs", "trainer.checkpoint_every_", "trainer.keep_checkpoints",
    # What to do with a batch that ruins the run is asked after it did: what was skipped is on record in the run.
    "trainer.on_nan", "trainer.spike_factor",
    "norm.compare",
)  # fmt: skip
PLACES = ("model.init",)  # where a file lies; what it holds is known by its digest


def identity(config: Config) -> dict[str, Any]:
    """What the run is, by key: all but where it happens."""
    return {
        key: value
        for key, value in by_key(dataclasses.asdict(config)).items()
        if not key.startswith(CIRCUMSTANCE) and key not in PLACES
    }


def differences(new: Config, old: Config) -> list[str]:
    """Where the identity of two runs differs, one line each. What either leaves open (0 threads, "") agrees."""
    left, right = identity(new), identity(old)
    filled = {"trainer.threads": 0, "data.digest": "", "data.num_classes": 0, "data.decoder": "", "schedule.epochs": 0}
    return [
        f"{key} = {left[key]!r}, the run has {right[key]!r}"
        for key in left
        if left[key] != right[key] and filled.get(key, ...) not in (left[key], right[key])
        and not (key == "model.init_digest" and new.model.init and not left[key])  # not looked at yet
    ]  # fmt: skip


def completed(config: Config, **values: dict[str, Any]) -> Config:
    """The config with single fields of its sections set, as in `completed(c, data={"num_classes": 10})`."""
    sections = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in values.items()}
    return dataclasses.replace(config, **sections)
