"""The average of several checkpoints' weights: given statistics of its own, scored beside its members, and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pipeline.callbacks.bad_samples import BadSamples
from pipeline.callbacks.population import Population
from pipeline.callbacks.statistics import Beside
from pipeline.config import Config, ConfigError, identity
from pipeline.data.shards import DataError
from pipeline.evaluation.metrics import Scores
from pipeline.norm.statistics import statistics_among
from pipeline.run.assembly import assemble, build_trainer, evaluated_by
from pipeline.run.failures import interruptible
from pipeline.run.reports import statistics_used
from pipeline.training.checkpoint_io import STAMP, CheckpointFiles, damage, weights_of, write_checkpoint
from pipeline.training.soup import SOUP, SoupError, mean_of
from pipeline.world import World

AVERAGED, ESTIMATED = "averages of the members'", "estimated anew"
# What makes two networks the same function of the same weights; initial weights and dropout are of their training.
_SAME = ("model.", "norm.eps", "data.image_size", "data.num_classes", "data.mean", "data.std")
_OF_TRAINING = ("model.initial_gain", "model.dropout", "model.init", "model.init_digest", "model.zero_gamma")


@dataclass(frozen=True, slots=True)
class Member:
    """A checkpoint. identity: what its run is, by key."""

    path: Path
    name: str
    step: int
    identity: Mapping[str, Any]

    def weights(self) -> Mapping[str, Tensor]:
        return weights_of(CheckpointFiles().load_checkpoint(self.path))


@dataclass(frozen=True, slots=True)
class Row:
    """Scores of one network. statistics: which its norms had."""

    network: str
    statistics: str
    scores: Scores


def average(
    config: Config, world: World, console: Console, *, members: Sequence[Path], output: Path, with_members: bool
) -> list[Row]:
    """Write the mean of the members' weights as a checkpoint; returns what it and they score on the validation images.

    config: of whose run it is to be a checkpoint. with_members: score each of them, too. Raises DataError for what is
    no whole checkpoint, ConfigError for members that are not of one network.
    """
    if not config.norm.precise_images:
        raise ConfigError("norm.precise_images = 0 estimates no statistics, and averaged weights need their own; set "
                          "norm.precise_images=8192")  # fmt: skip
    found = [member_of(path) for path in members]
    _check(found)
    if len(seeds := {str(member.identity.get("seed")) for member in found}) > 1:
        console.print(f"WARNING: the members began with different weights (seeds {', '.join(sorted(seeds))}); of "
                      "networks that share no beginning the mean seldom works: average their predictions",
                      highlight=False, soft_wrap=True)  # fmt: skip
    try:
        soup = mean_of((member.name, member.weights()) for member in found)
    except SoupError as error:
        raise ConfigError(str(error)) from None
    rows: list[Row] = []
    with interruptible():
        for member in found if with_members else ():
            rows += _scored(config, world, console, member.name, member.weights())[0]
        of_soup, soup = _scored(config, world, console, f"average of {len(found)}", soup, beside=AVERAGED)
    rows += of_soup
    if world.leads:
        origin = {"members": [member.name for member in found], "scores": [_plain(row) for row in rows]}
        step = max(member.step for member in found)
        write_checkpoint({"state_dict": soup, "global_step": step, SOUP: origin}, output, identity(config))
        console.print(_table(rows, config))
    return rows


def member_of(path: Path) -> Member:
    """Raises DataError for what is no whole checkpoint."""
    if fault := damage(path):
        raise DataError(f"{path} is no whole checkpoint: {fault}; give another")
    content = CheckpointFiles().load_checkpoint(path)
    name = f"{path.resolve().parent.parent.name}/{path.stem}"  # of RUN/checkpoints/step-00000100.ckpt
    return Member(path, name, int(content["global_step"]), content[STAMP].get("identity", {}))


def _check(members: Sequence[Member]) -> None:
    """Raises ConfigError where two are not of one network, whatever fits into its tensors."""
    first = members[0]
    for member in members:
        for key, value in member.identity.items():
            if key.startswith(_SAME) and key not in _OF_TRAINING and value != first.identity.get(key, value):
                raise ConfigError(
                    f"{member.name} is of another network: {key} = {value!r}, {first.name} has "
                    f"{first.identity[key]!r}; average checkpoints of one network"
                )


def _scored(
    config: Config, world: World, console: Console, name: str, state: Mapping[str, Tensor], beside: str = ""
) -> tuple[list[Row], dict[str, Tensor]]:
    """Scores of weights with statistics that are estimated for them; and the state with those.

    beside: what to call those that the state comes with, if they are to be scored, too.
    """
    console.print(f"scoring {name} ...", highlight=False, soft_wrap=True)
    run = assemble(evaluated_by(config, world), world)
    try:
        run.classifier.averaging = None  # of a run that keeps an average, that is the network from here on
        run.classifier.load_state_dict(state)
    except RuntimeError:
        raise ConfigError(
            f"{name} does not fit the model of {config.directory}; give a run of the same network first"
        ) from None
    # Of what every rank has just loaded, and not by a collective: nccl has none for a network that is still on the CPU.
    own = {name: value.clone() for name, value in statistics_among(run.classifier.model.state_dict()).items()}
    population = Population(run.data.train_loader, config.norm.precise_images, form=config.norm.precise_form)
    directory, budget = config.directory / "bad-samples", config.data.bad_samples
    callbacks: list[lightning.Callback] = [population, *([Beside(lambda: own)] if beside and own else [])]
    callbacks.append(BadSamples(directory, run.data, budget=budget, rank=world.rank, console=console))
    build_trainer(run, callbacks).validate(run.classifier, datamodule=run.data, verbose=False)
    scores, others = run.classifier.scores, run.classifier.scores_beside
    assert scores is not None
    rows = [Row(name, ESTIMATED if own else "none", scores)] + ([Row(name, beside, others)] if others else [])
    return rows, {key: value.detach().cpu() for key, value in run.classifier.state_dict().items()}


def _plain(row: Row) -> dict[str, Any]:
    return {"network": row.network, "statistics": row.statistics, **asdict(row.scores)}


def _table(rows: Sequence[Row], config: Config) -> Table:
    table = Table(title=f"averaged weights; statistics: {statistics_used(config)}", title_justify="left")
    for heading in ("network", "statistics"):
        table.add_column(heading)
    for heading in ("top-1", "top-5", "loss"):
        table.add_column(heading, justify="right")
    for row in rows:
        scores = row.scores
        table.add_row(row.network, row.statistics, f"{scores.top1:.2%}", f"{scores.top5:.2%}", f"{scores.loss:.4f}")
    return table
