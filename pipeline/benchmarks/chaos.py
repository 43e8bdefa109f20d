"""Runs that are killed at random moments, and started again until they are done, beside one that was left alone.

What must be equal, bit for bit, on the same number of ranks: final weights and momenta, every row of
metrics.csv but its clocks, and the ledger, in which each sample stands once an epoch. W&B's segments together
must hold the rows of metrics.csv, each once. A third of the kills waits for a checkpoint that is being written,
a third for a validation.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.benchmarks.ranks import copied, started
from pipeline.callbacks.journal import Row, read_journal
from pipeline.callbacks.segments import position, position_of, segments
from pipeline.launch.plan import read_record
from pipeline.launch.pulse import read_place
from pipeline.training.checkpoint import checkpoints
from pipeline.training.checkpoint_io import TEMPORARY

ANYTIME, WRITING, VALIDATION = "anytime", "writing a checkpoint", "validation"
_ALONE_SECONDS = 60.0  # that ranks have to notice the death of another
_GRACE_SECONDS = 3.0
_ENDLESS = 40  # starts without an end, after which a run is given up


@dataclass(frozen=True, slots=True)
class Kill:
    """One interruption: what it waited for and how long, by what, and whether it met one rank or all."""

    run: str
    moment: str
    seconds: float
    signal: str
    ranks: str
    step: int  # of the newest checkpoint afterwards
    torn: bool  # it left half a checkpoint behind


@dataclass(slots=True)
class Report:
    """What happened, and each way in which an interrupted run was not the same run, in one line."""

    kills: list[Kill] = field(default_factory=list)
    runs: int = 0
    differences: list[str] = field(default_factory=list)


def chaos(
    frozen: Path,
    work: Path,
    *,
    worlds: Sequence[int],
    kills: int,
    seed: int = 0,
    variants: Sequence[Sequence[str]] = ((),),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Interrupt copies of the run in `frozen` so many times, in turn on each number of ranks and with each variant.

    frozen: a run's directory, of which config.yaml is taken. work: where the copies are made.
    variants: overrides, as `norm.group_size=1`. Which moments and signals is a function of the seed.
    """
    draw, report = random.Random(seed), Report()  # noqa: S311  (no secret)
    references: dict[tuple[int, int], tuple[Path, float]] = {}
    for number in itertools.count():
        world = worlds[number % len(worlds)]
        variant = number // len(worlds) % len(variants)
        overrides = ["ledger=true", *variants[variant]]
        if (world, variant) not in references:
            whole = copied(frozen, work / f"whole-{world}-{variant}")
            began = time.monotonic()
            codes, _ = _ended(started(whole, world, overrides), None, whole)
            if any(codes):
                raise RuntimeError(f"{whole}: the run itself ends with {codes}; see its logs")
            references[world, variant] = (whole, time.monotonic() - began)
        whole, seconds = references[world, variant]
        broken = copied(frozen, work / f"broken-{number}")
        _interrupt_until_done(broken, world, overrides, seconds, draw, report, kills, progress)
        report.runs += 1
        report.differences += [f"{broken.name} ({world} ranks): {d}" for d in differences(whole, broken, world)]
        if len(report.kills) >= kills:
            return report
    raise AssertionError


def summary(report: Report) -> str:
    """How many runs were interrupted how and when, in one line."""

    def counted(name: str) -> str:
        found = Counter(getattr(kill, name) for kill in report.kills)
        return ", ".join(f"{count} {what}" for what, count in sorted(found.items()))

    torn = sum(kill.torn for kill in report.kills)
    return (
        f"{report.runs} runs, {len(report.kills)} times interrupted ({counted('signal')}; {counted('moment')}; "
        f"{torn} left half a checkpoint)"
    )


def _interrupt_until_done(
    directory: Path,
    world: int,
    overrides: list[str],
    seconds: float,
    draw: random.Random,
    report: Report,
    kills: int,
    progress: Callable[[int, int], None],
) -> None:
    for _ in range(_ENDLESS):
        ranks = started(directory, world, overrides)
        chosen = draw.choice((ranks, [draw.choice(ranks)]))
        aim = Aim(
            draw.choice((ANYTIME, WRITING, VALIDATION)),
            draw.uniform(0, 0.8 * seconds),  # later, and most runs would be done before
            draw.choice((signal.SIGKILL, signal.SIGTERM)),
            chosen,
        )
        wanted = len(report.kills) < kills
        began = time.monotonic()
        codes, struck = _ended(ranks, aim if wanted else None, directory)
        if None in codes or (any(codes) and not struck):
            report.differences.append(f"{directory.name} ({world} ranks): ended with {codes} after {report.kills[-1:]}")
            return
        if not struck:
            return
        step = checkpoints(directory / "checkpoints")
        met = "all" if len(chosen) == world else f"rank {ranks.index(chosen[0])}"
        at = int(step[-1].stem[5:]) if step else 0
        torn = any((directory / "checkpoints").glob(TEMPORARY))
        report.kills.append(Kill(directory.name, aim.moment, struck - began, aim.signal.name, met, at, torn))
        progress(len(report.kills), kills)
        if not any(codes):  # it was done before the signal counted
            return
    report.differences.append(f"{directory.name} ({world} ranks): not done after {_ENDLESS} starts")


def differences(whole: Path, broken: Path, world: int) -> list[str]:
    """In what the results of two runs differ, one line each."""
    if not checkpoints(broken / "checkpoints"):
        return ["there is no checkpoint"]
    found = []
    states = [_final(directory) for directory in (whole, broken)]
    for part in ("state_dict", "optimizer_states"):
        names = sorted(name for name, left, right in _pairs(states[0][part], states[1][part]) if not _same(left, right))
        if names:
            found.append(f"{len(names)} tensors of {part} differ, {names[0]} first")
    if states[0]["global_step"] != states[1]["global_step"]:
        found.append(f"{states[1]['global_step']} steps instead of {states[0]['global_step']}")
    rows = [[_unclocked(row) for row in read_journal(directory / "metrics.csv")] for directory in (whole, broken)]
    if rows[0] != rows[1]:
        odd = [row for row in rows[1] if row not in rows[0]] or [row for row in rows[0] if row not in rows[1]]
        found.append(f"metrics.csv has {len(rows[1])} rows instead of {len(rows[0])}; {odd[:1]}")
    if (whole / "wandb").is_dir():
        found += _untracked(broken)
    for rank in range(world):
        lines = [(d / "ledger" / f"rank-{rank}.jsonl").read_text().splitlines() for d in (whole, broken)]
        if lines[0] != lines[1]:
            found.append(f"the ledger of rank {rank} differs, {len(lines[1])} lines instead of {len(lines[0])}")
    epochs: dict[int, list[str]] = {}
    for path in sorted((broken / "ledger").glob("rank-*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            epochs.setdefault(line["epoch"], []).extend(line["keys"])
    twice = [epoch for epoch, keys in epochs.items() if len(keys) != len(set(keys))]
    if twice:
        found.append(f"a sample was used twice in epoch {twice[0]}")
    return found


def _untracked(directory: Path) -> list[str]:
    """What W&B's segments hold otherwise than metrics.csv."""
    rows = read_journal(directory / "metrics.csv")
    written = [row for each in segments(directory, read_record(directory).wandb_id) for row in each.rows()]
    kept = [(position_of(row), row.get("train/loss", row.get("val/loss"))) for row in written]
    expected = [(position(row.step, row.split), row.loss) for row in rows]
    if kept == expected:
        return []
    odd = next((b or a for a, b in itertools.zip_longest(expected, kept) if a != b), None)
    return [f"W&B's segments hold {len(kept)} rows instead of {len(expected)}, position and loss {odd} first"]


class Aim(NamedTuple):
    """At the next such moment, so many seconds after the start or later, send the signal to these ranks."""

    moment: str
    seconds: float
    signal: signal.Signals
    ranks: list[BaseProcess]


def _ended(ranks: list[BaseProcess], aim: Aim | None, directory: Path) -> tuple[list[int | None], float]:
    """Exit codes, None for a rank that had to be ended, and when the aim was struck, 0 if the run was done before.

    After it the ranks get as long as they may take to notice.
    """
    struck = 0.0
    if aim is not None:
        begun = time.monotonic() + aim.seconds
        while any(rank.is_alive() for rank in ranks) and not (time.monotonic() > begun and _is_now(aim, directory)):
            time.sleep(0.001)
        for rank in aim.ranks:
            if rank.is_alive() and rank.pid:
                struck = time.monotonic()
                os.kill(rank.pid, aim.signal)
    deadline = time.monotonic() + (_ALONE_SECONDS if struck else 600)
    while any(rank.is_alive() for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.01)
        if struck and time.monotonic() > struck + _GRACE_SECONDS and not all(rank.is_alive() for rank in ranks):
            for number, rank in enumerate(ranks):
                if not _has_begun(number, directory):
                    rank.kill()
    codes: list[int | None] = []
    for rank in ranks:
        alive = rank.is_alive()
        if alive:
            rank.kill()
        rank.join()
        codes.append(None if alive else rank.exitcode)
        rank.close()
    return codes, struck


def _has_begun(rank: int, directory: Path) -> bool:
    """Whether a rank has found the others; one that never will is for its launcher to end, as launch/local does."""
    place = read_place(directory / "pulses" / f"rank-{rank}")
    return place is not None and place.phase != "start"


def _is_now(aim: Aim, directory: Path) -> bool:
    if aim.moment == WRITING:
        return any((directory / "checkpoints").glob(TEMPORARY))
    if aim.moment == VALIDATION:
        place = read_place(directory / "pulses" / "rank-0")
        return place is not None and place.phase == VALIDATION
    return True


def _final(directory: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(checkpoints(directory / "checkpoints")[-1], weights_only=True)
    return state


def _pairs(left: Any, right: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every leaf of two nested structures, by name; a leaf that one of them lacks is paired with None."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in {**left, **right}:
            yield from _pairs(left.get(key), right.get(key), f"{name}.{key}" if name else str(key))
    elif isinstance(left, list) and isinstance(right, list):
        for number, (a, b) in enumerate(itertools.zip_longest(left, right)):
            yield from _pairs(a, b, f"{name}.{number}")
    else:
        yield name, left, right


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return type(left) is type(right) and bool(left == right)


def _unclocked(row: Row) -> tuple[Any, ...]:
    return row.step, row.epoch, row.split, row.loss, row.top1, row.top5, row.images, row.rate
