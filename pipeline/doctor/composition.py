"""The config of the words that were typed, and all faults that can be found in it, not the first alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.config import AXES, Config, ConfigError, completed, compose_config, read_config
from pipeline.doctor.findings import Finding, fault, of_message, ok
from pipeline.launch.plan import RECORD


def compose(words: Sequence[str]) -> tuple[Config | None, list[Finding]]:
    """The config without the words that are at fault; None where it has no sense without them."""
    files = [word for word in words if word.endswith((".yaml", ".yml")) and "=" not in word]
    overrides = [word for word in words if word not in files]
    if len(files) > 1:
        return None, [fault("config", f"{files[1]} is a second config", "give one RUN/config.yaml, key=value behind")]
    config, errors = (
        sifted(overrides, lambda words: _of_run(Path(files[0]), words)) if files else sifted(overrides, compose_config)
    )
    found = [of_message("config", error) for error in errors]
    if config is not None:
        run = config.run
        named = ", ".join(f"{axis} {getattr(run, axis)}" for axis in AXES if getattr(run, axis))
        beside = " (the other checks leave out what is wrong)" if errors else ""
        found.append(ok("config", f"{files[0] + ': ' if files else ''}{named}{beside}"))
    return config, found


def sifted(words: Sequence[str], read: Callable[[Sequence[str]], Config]) -> tuple[Config | None, list[str]]:
    """What can be read of the words, and one error a word that had to be left out for that."""
    words = list(words)
    errors: list[str] = []
    while True:
        error = _error(words, read)
        if not error:
            return read(words), errors
        errors.append(error)
        # The word without which this error goes. One that it names comes first: of two words that contradict each
        # other either would do.
        order = sorted(range(len(words)), key=lambda i: not error.startswith((words[i].split("=")[0], f"'{words[i]}'")))
        culprit = next((i for i in order if _error(words[:i] + words[i + 1 :], read) != error), None)
        if culprit is None:
            return None, errors
        del words[culprit]


def _error(words: Sequence[str], read: Callable[[Sequence[str]], Config]) -> str:
    try:
        read(words)
    except ConfigError as error:
        return str(error)
    return ""


def _of_run(path: Path, overrides: Sequence[str]) -> Config:
    """A frozen config; one that lies in its run's directory belongs to that directory."""
    config = read_config(path, overrides)
    if (path.parent / RECORD).is_file():
        config = completed(config, run={"dir": str(path.parent.parent), "id": path.parent.name})
    return config
