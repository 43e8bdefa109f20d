"""What the numbers of a config come to: shares, statistics, rate, steps. No number here is measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.data.batch import micro_batches, rank_places
from pipeline.doctor.findings import Finding, fault, ok, warning
from pipeline.training.schedule import Schedule

FEW = 16  # images below which the statistics of a batch are said to be noisy


@dataclass(frozen=True, slots=True)
class Cut:
    """A global batch over ranks. Sizes in images; group: ranks that share statistics."""

    batch: int
    world: int
    micro: int = 0  # the most that a rank holds at once; 0 = its whole share
    group: int = 0  # 0 = all

    @property
    def pieces(self) -> int:
        return micro_batches(self.batch, self.world, self.micro)

    def sizes(self, piece: int) -> list[int]:
        """Images of each rank in a micro-batch."""
        return [len(rank_places(self.batch, self.pieces, piece, self.world, rank)) for rank in range(self.world)]


def check_shares(cut: Cut) -> Iterator[Finding]:
    """How many images each rank holds at a time."""
    pieces = cut.pieces
    most, least = cut.sizes(0), cut.sizes(pieces - 1)  # earlier micro-batches are the larger ones
    sizes = f"{max(most)}" if max(most) == min(least) else f"{min(least)} to {max(most)}"
    where = f"{cut.world} ranks" if cut.world > 1 else "1 process"
    text = f"{cut.batch} images a step over {where}: {sizes} at once each"
    if pieces > 1:
        text += f", in {pieces} micro-batches"
    idle = least.count(0)
    if idle:
        yield warning("shares", f"{text}; {idle} of {cut.world} ranks get none in {'a' if pieces > 1 else 'each'} step",
                      f"at most {cut.batch // pieces} ranks, or a larger data.global_batch_size")  # fmt: skip
    else:
        yield ok("shares", text)
    if cut.micro and pieces == 1 and cut.micro > max(most):
        yield warning("micro-batch", f"data.micro_batch_size = {cut.micro} bounds nothing: a rank's whole share is "
                      f"{max(most)} images", "leave it at 0")  # fmt: skip


def check_statistics(cut: Cut, normalized: bool, *, frozen: str = "", group_images: int = 0) -> Iterator[Finding]:
    """How many images the batch statistics are taken over.

    normalized: by norms. frozen, group_images: the config's; with the first all norms keep what was loaded.
    """
    if normalized and frozen:
        yield ok("statistics", f"all norms keep those that were loaded (norm.frozen = {frozen}): none are taken of a "
                 "batch")  # fmt: skip
        return
    if not normalized:
        yield ok("statistics", "the model has no batch normalization")
        return
    group = cut.group or cut.world
    least = cut.sizes(cut.pieces - 1)
    seen = [sum(least[first : first + group]) for first in range(0, cut.world, group)]
    who = (
        "one process"
        if cut.world == 1
        else "all ranks"
        if group == cut.world
        else f"groups of {group} ranks"
        if group > 1
        else "each rank for itself"
    )
    text = f"over {min(seen)}{f' to {max(seen)}' if max(seen) > min(seen) else ''} images, {who}"
    if cut.pieces > 1:
        text += ": those of a micro-batch, not of the global batch"
    if min(seen) < FEW and min(seen) < cut.batch:
        alone = "raise norm.group_images" if group_images else "norm.group_size=0"
        remedy = alone if group < cut.world else "a larger data.micro_batch_size"
        yield warning("statistics", f"{text}; fewer than {FEW} make them noisy", remedy)
    else:
        yield ok("statistics", text)


def check_batch(batch: int, images: int) -> Iterator[Finding]:
    """Whether an epoch holds a global batch, and what it leaves out."""
    if batch > images:
        yield fault("batch", f"data.global_batch_size = {batch} exceeds the {images:,} training images",
                    f"lower it to {images} at most")  # fmt: skip
    elif (left := images % batch) * 10 > images:
        yield warning("batch", f"each epoch leaves out {left:,} of {images:,} images ({left / images:.0%}; another "
                      "selection each time)", f"data.global_batch_size={_fitting(batch, images)}")  # fmt: skip
    elif left:
        yield ok("batch", f"each epoch leaves out {left:,} of {images:,} images, another selection each time")
    else:
        yield ok("batch", f"each epoch takes all {images:,} images")


def check_steps(batch: int, images: int, max_epochs: int, max_steps: int) -> Iterator[Finding]:
    """Length of the run."""
    epoch = images // batch
    total = total_steps(batch, images, max_epochs, max_steps)
    text = f"{epoch:,} steps an epoch, {total:,} steps and {total * batch:,} images in all"
    if total == 0:
        yield warning("steps", f"{text}: nothing is trained", "raise trainer.max_epochs or trainer.max_steps")
    else:
        yield ok("steps", text)


def total_steps(batch: int, images: int, max_epochs: int, max_steps: int) -> int:
    return min(limit for limit in (max_steps, max_epochs * (images // batch)) if limit >= 0)


def check_rate(schedule: Schedule, steps: int, max_epochs: int = -1) -> Iterator[Finding]:
    """The learning rate of the global batch, and whether it ends with a run of so many steps, max_epochs at most."""
    factor = schedule.scaled_rate / schedule.rate
    text = (f"{schedule.scaled_rate:g} for {schedule.global_batch_size} images ({schedule.rate:g} for "
            f"{schedule.rate_batch_size})")  # fmt: skip
    if schedule.warmup_epochs:
        text += f", after a warm-up of {schedule.warmup_epochs:g} epoch{'' if schedule.warmup_epochs == 1 else 's'}"
    if misfit := schedule.misfit(steps):
        yield warning("rate", f"{text}: {misfit}", _fitting_epochs(schedule, steps, max_epochs))
    elif factor > 8 and not schedule.warmup_epochs:
        yield warning("rate", f"{text}: {factor:.0f} times the stated one from the first step on",
                      "schedule.warmup_epochs=5, or a smaller data.global_batch_size")  # fmt: skip
    else:
        yield ok("rate", text)


def _fitting_epochs(schedule: Schedule, steps: int, max_epochs: int) -> str:
    """How a curve is made to end with the run, which trainer.max_steps may end before max_epochs."""
    if not replace(schedule, epochs=max_epochs).misfit(steps):
        return "schedule.epochs=0 in a new run, for trainer.max_epochs"
    epochs = steps * schedule.global_batch_size / schedule.images
    lower = ", and a schedule.warmup_epochs below that" if schedule.warmup_epochs >= epochs else ""
    return f"schedule.epochs={epochs:.4g} in a new run, for trainer.max_steps{lower}"


def _fitting(batch: int, images: int) -> int:
    """The batch near this one that leaves out the least."""
    near = range(max(1, batch // 2), batch + 1)
    return min(near, key=lambda size: (images % size, batch - size))
