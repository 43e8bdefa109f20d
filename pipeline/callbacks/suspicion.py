"""Who is it that the others wait for? A pure function of what every rank says of itself.

A rank inside a collective is never guilty while another is outside of one: it is waiting for that one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from pipeline.launch.pulse import PHASES

SEEN = 2  # a phase that a rank has left so often has a usual duration
TIMES = 3.0  # so many times the longest duration seen is no alarm
BROKEN, FAILED = "broken", "failed"  # a collective of this rank failed; something else did


@dataclass(frozen=True, slots=True)
class Report:
    """age: seconds without a move. limit: seconds that are allowed. waiting: inside a collective. where: its line."""

    rank: int
    host: str
    phase: str
    step: int
    epoch: int
    number: int
    age: float
    limit: float
    waiting: bool
    where: str = ""
    trouble: str = ""

    @property
    def position(self) -> tuple[int, int, int]:
        """How far it has come; ranks train in step."""
        return self.step, self.number, PHASES.index(self.phase)


@dataclass(frozen=True, slots=True)
class Suspicion:
    """excess: how many times over its limit the least of them is. reason: silent, failed, stands or meet."""

    reports: tuple[Report, ...]
    excess: float
    reason: str


def limit(phase: str, *, seen: int, longest: float, hang_seconds: float, first_seconds: float) -> float:
    """Seconds without a move that are no alarm. What has not been seen twice (compiling, first reads) has longer."""
    if phase == "end":
        return float("inf")
    return max(hang_seconds, TIMES * longest, first_seconds if seen < SEEN else 0.0)


def suspects(
    reports: Iterable[Report], silent: Mapping[int, float], *, patience: float, failed_patience: float = 5.0
) -> Suspicion | None:
    """The ranks that hold up the run. silent: seconds since a rank's thread last spoke; patience: that are allowed."""
    known = [report for report in reports if report.phase != "end"]
    gone = [report for report in known if silent.get(report.rank, 0.0) > patience]
    alive = [report for report in known if report not in gone]
    failed = [r for r in known if r.trouble == FAILED and silent.get(r.rank, 0.0) > failed_patience]
    if failed:
        return Suspicion(tuple(failed), min(silent[r.rank] / failed_patience for r in failed), "failed")
    if gone:
        # What it said last is a second old. It has given its part to every step that the others have left behind.
        behind = min(alive, key=lambda r: r.position, default=None)
        moved = [
            replace(r, step=behind.step, epoch=behind.epoch, number=behind.number, phase=behind.phase, where="")
            if behind is not None and behind.position > r.position
            else replace(r, where="")
            for r in gone
        ]
        return Suspicion(tuple(moved), min(silent[r.rank] / patience for r in gone), "silent")
    free = [r for r in alive if not r.waiting and r.trouble != BROKEN]
    guilty = [r for r in free if r.age > r.limit] if free else alive
    if not guilty or any(r.age <= r.limit for r in guilty):
        return None
    least = min(r.position for r in guilty)
    guilty = [r for r in guilty if r.position == least]
    return Suspicion(tuple(guilty), min(r.age / r.limit for r in guilty), "stands" if free else "meet")


def in_collective(stack: Iterable[tuple[str, str]], phase: str) -> bool:
    """Whether a stack of (file, function), innermost last, is in a collective, or waits for the sum of gradients."""
    frames = list(stack)
    if any("/torch/distributed/" in file for file, _ in frames):
        return True
    waits = ("callbacks/agreement.py", "norm/collectives.py")
    if any(file.endswith(waits) and function == "_arrived" for file, function in frames):
        return True
    return phase == "gradients" and bool(frames) and frames[-1][1] == "_engine_run_backward"
