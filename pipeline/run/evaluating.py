"""A checkpoint's say on every validation image: each once, the same bits on any number of ranks and after any stop.

What goes through the network together is fixed (data/blocks.py), and so are the batches of the population statistics
(norm/apart.py): a rank takes whole ones of either, and nothing is summed in the order of ranks. What is done lies in
RUN/evaluation/<name>/, a directory for all that the results depend on (evaluation/results.py).
Legend: N images, V views of each, K classes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.console import Console
from torch import Tensor

from pipeline.callbacks.population import running_averages
from pipeline.callbacks.preemption import InterruptedRunError
from pipeline.callbacks.progress import EvaluationProgress
from pipeline.config import Config, completed, identity
from pipeline.data.batch import Batch
from pipeline.data.blocks import BlockLoader, open_blocks
from pipeline.data.crops import Views
from pipeline.data.evaluation_set import EvaluationSet
from pipeline.data.loader import POPULATION_EPOCH, Items, TrainShares, Workers
from pipeline.data.shards import DataError, file_sha256, write_atomically
from pipeline.evaluation.intervals import wilson
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.results import PREDICTIONS, Buffer, Results, digest_of
from pipeline.launch.failure import AGAIN, FailedRunError
from pipeline.norm.apart import estimate_apart, set_statistics, statistics_of
from pipeline.norm.collectives import sum_over_world
from pipeline.run import load_weights, read_weights
from pipeline.run.assembly import Assembly, accelerator_of, assemble, build_trainer
from pipeline.run.failures import interruptible
from pipeline.run.reports import statistics_used
from pipeline.training.checkpoint_io import AVERAGED
from pipeline.training.classifier import Classifier
from pipeline.training.soup import SOUP
from pipeline.world import World

SCORES, DIRECTORY, BAD_SAMPLES = "evaluation.json", "evaluation", "bad-samples.jsonl"
_ROWS_AT_ONCE = 144  # views that go through the network together, where data.micro_batch_size does not ask for fewer
_STATISTICS_IMAGES = 256  # of a batch for the statistics at most: one rank must have room for it
_LOOK_SECONDS = 1.0  # between looks at how far the other ranks are


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of which weights, about which images."""

    config: Config
    checkpoint: Path
    views: int
    source: EvaluationSet
    step: int
    settings: dict[str, Any]

    @property
    def directory(self) -> Path:
        """Where its results are."""
        views = f"{self.views}-view{'s' if self.views > 1 else ''}"
        name = f"step-{self.step:08d}-{self.source.name}-{views}-{digest_of(self.settings)[:8]}"
        return self.config.directory / DIRECTORY / name

    @property
    def images(self) -> int:
        """How many there are."""
        return self.source.images

    @property
    def images_each(self) -> int:
        """Images of a block."""
        data = self.config.data
        rows = data.micro_batch_size or _ROWS_AT_ONCE
        return max(1, min(rows // self.views, data.global_batch_size))

    @property
    def beside(self) -> Question | None:
        """The same with running averages, where norm.compare asks for their scores, too."""
        if not self.config.norm.compare:
            return None
        config = completed(self.config, norm={"compare": False, "precise_images": 0})
        return replace(self, config=config, settings={**self.settings, **_by_config(config)})

    def own_scores(self) -> dict[str, Any] | None:
        """Those of this question alone, where all is done and kept."""
        path = self.directory / SCORES
        if not (path.is_file() and (self.directory / PREDICTIONS).is_file()):
            return None
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def scores(self) -> dict[str, Any] | None:
        """What evaluation.json says, where all is done."""
        scores = self.own_scores()
        if scores is None or self.beside is None:
            return scores
        other = self.beside.scores()
        return other and {
            **scores,
            "running_averages": {name: other[name] for name in ("loss", "top1", "top5", "images")},
        }

    @property
    def is_answered(self) -> bool:
        """Whether every image has been through the network, and what was found of them is only to be put together."""
        return all(each is None or each.own_scores() is not None or not each.missing(each.results())
                   for each in (self, self.beside))  # fmt: skip

    def missing(self, results: Results) -> list[int]:
        """Blocks that are still to be done. Raises PredictionsError for parts of something else."""
        done = results.blocks()
        return [number for number in range(math.ceil(self.images / self.images_each)) if number not in done]

    def results(self) -> Results:
        """Raises PredictionsError where the directory holds results of something else."""
        return Results(self.directory, self.settings, self.images)


def ask(config: Config, source: EvaluationSet, checkpoint: Path, views: int) -> Question:
    """All that the results depend on. Raises DataError for what is no checkpoint."""
    state = read_weights(checkpoint)
    step = int(state["global_step"])
    if AVERAGED in state or SOUP in state:  # running averages are those of the trained weights
        config = completed(config, norm={"compare": False})
    settings = {
        "checkpoint": file_sha256(checkpoint), "step": step, "split": source.name, "images": source.images,
        "views": views, **({} if source.is_own else {"set": source.digest}),
        "rows_at_once": config.data.micro_batch_size or _ROWS_AT_ONCE, "accelerator": accelerator_of(config),
        "torch": str(torch.__version__), **_by_config(config, state),
    }  # fmt: skip
    return Question(config, checkpoint, views, source, step, settings)


def _by_config(config: Config, state: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Which statistics, and what else the run is."""
    return {"statistics": statistics_used(config, state), "statistics_batch": statistics_batch(config),
            "config": json.loads(json.dumps(identity(config)))}  # fmt: skip


def statistics_batch(config: Config) -> int:
    """Images of a batch for the population statistics."""
    together = config.norm.group_images or config.data.micro_batch_size or _STATISTICS_IMAGES
    return min(config.data.global_batch_size, together)


def evaluate(question: Question, world: World, console: Console) -> dict[str, Any] | None:
    """Scores, as evaluation.json keeps them; None on a rank that does not lead.

    Goes on where an earlier start was stopped. Raises InterruptedRunError, DataError, PredictionsError, FailedRunError.
    """
    if question.scores() is None:
        for each in (question, question.beside):
            if each is None or each.own_scores() is not None:
                continue
            results = each.results()
            with _told(each, results, world), interruptible():
                _answer(each, results, world, console)
                if world.leads:
                    _finish(each, results, console)
    else:
        console.print(f"all {question.images:,} images were evaluated already, in {question.directory}",
                      highlight=False, soft_wrap=True)  # fmt: skip
    if not world.leads:
        return None
    scores = question.scores()
    if question.source.is_own:  # what a run is known by is what it says of its own validation images
        write_atomically(question.config.directory / SCORES, (json.dumps(scores, indent=2) + "\n").encode())
    return scores


@contextmanager
def _told(question: Question, results: Results, world: World) -> Iterator[None]:
    """Whoever interrupts it is told what is kept."""
    try:
        yield
    except InterruptedRunError:
        if not world.leads:
            raise
        raise InterruptedRunError(
            f"interrupted with {min(results.count(), question.images):,} of {question.images:,} images evaluated, in "
            f"{question.directory}; the same command goes on from there"
        ) from None


def _answer(question: Question, results: Results, world: World, console: Console) -> None:
    """Evaluate what is missing of this rank's blocks; the leading one returns when those of all are there."""
    kept, images, missing = results.count(), question.images, question.missing(results)
    if kept and world.leads:
        console.print(f"going on: {kept:,} of {images:,} images were evaluated already", highlight=False)
    if not missing:
        return
    progress = EvaluationProgress(console, images, kept)
    with progress:
        run = assemble(completed(question.config, norm={"group_images": 0}), world)  # it has batches of its own
        state = load_weights(run.classifier, question.checkpoint)
        if not question.config.norm.precise_images:  # a validation may have put the population's in their place
            run.classifier.model.load_state_dict(averages(state), strict=False)
        mine = [number for number in missing if number % world.size == world.rank]
        # A rank for which none is left does one that counts for another: Lightning's loop would leave out its hooks,
        # in which the others wait for it.
        evaluator = _evaluator(question, run, results, mine or missing[:1], progress)
        evaluator.counts = bool(mine)
        trainer = build_trainer(run, [])
        try:
            trainer.predict(evaluator, dataloaders=evaluator.loader, return_predictions=False)
        finally:
            evaluator.buffer.flush()
        if world.leads:
            _wait(results, question, progress)


def averages(state: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Running averages that lie beside the weights; of averaged weights there are none but those among them."""
    return {} if AVERAGED in state else running_averages(state) or {}


def _evaluator(
    question: Question, run: Assembly, results: Results, numbers: list[int], progress: EvaluationProgress
) -> Evaluator:
    data, views = run.data, Views(question.views, run.data.crop)
    batching = replace(
        data.batching, world=1, rank=0, micro_batch_size=0, global_batch_size=statistics_batch(question.config)
    )
    train = data.train_loader.shares
    items = Items(
        TrainShares(train.images, train.augment, batching),
        partial(open_blocks, question.source, views, question.images_each),
    )
    return Evaluator(question, run, results, BlockLoader(Workers(items, batching.workers), numbers), progress)


class Evaluator(lightning.LightningModule):
    """The mean of each image's class probabilities over its views, block by block; what it finds goes to its buffer."""

    def __init__(
        self, question: Question, run: Assembly, results: Results, loader: BlockLoader, progress: EvaluationProgress
    ):
        super().__init__()
        self.question, self.world, self.results, self.loader = question, run.world, results, loader
        self.classifier: Classifier = run.classifier
        self.buffer, self.progress = Buffer(results), progress
        self.counts = True  # what it finds, and is not of another rank's blocks
        self._looked = time.monotonic()

    def on_predict_start(self) -> None:
        if self.question.config.norm.precise_images:
            self._take_statistics()
        self.progress.begin()

    def _take_statistics(self) -> None:
        """Population statistics: those that an earlier start saved, or new ones."""
        model = self.classifier.model
        own = statistics_of(model)
        if not len(own):  # no norms, or all of them frozen
            return
        mine = own.new_zeros(1 + len(own))
        saved = self.results.statistics() if self.world.leads else None
        if saved is not None:
            mine[0], mine[1:] = 1, torch.from_numpy(saved)
        shared = sum_over_world(mine)  # one rank's, so exact; whether the others see the file does not matter
        if shared[0]:
            set_statistics(model, shared[1:])
            return
        self._estimate()
        if self.world.leads:
            self.results.save_statistics(statistics_of(model).cpu().numpy())

    def _estimate(self) -> None:
        norm, shares = self.question.config.norm, self.loader.workers.items.train
        each = shares.batching.global_batch_size
        count = min(len(shares.images.split) // each, math.ceil(norm.precise_images / each))
        mine = range(self.world.rank, count, self.world.size)

        def batches() -> Iterator[tuple[int, Batch]]:
            for number, (batch, _) in zip(mine, self.loader.workers.load(POPULATION_EPOCH, mine), strict=True):
                self.progress.say(f"population statistics, {number * each:,} of {count * each:,} images")
                yield number, self.trainer.strategy.batch_to_device(batch)

        with self.trainer.precision_plugin.forward_context():
            estimate_apart(self.classifier.model, batches(), count, self.classifier, form=norm.precise_form)

    def predict_step(self, batch: Batch, number: int) -> tuple[Tensor, Tensor]:
        """Of each image the log of its mean probabilities (N, K), and the loss they have, in float64."""
        rows, views = self.question.settings["rows_at_once"], self.question.views
        parts = [Batch(*columns) for columns in zip(*(torch.split(column, rows) for column in batch), strict=True)]
        logits_RK = torch.cat([self.classifier(part).main_NK for part in parts])
        by_view_NVK = logits_RK.double().log_softmax(1).view(-1, views, logits_RK.shape[1])
        log_mean_NK = by_view_NVK.logsumexp(1) - math.log(views)
        loss_N = self.classifier.loss.per_image(log_mean_NK, None, batch.label_N[::views])
        return log_mean_NK, loss_N

    def on_predict_batch_end(self, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if not self.counts:
            return
        views = self.question.views
        is_image = batch.weight_N[::views].cpu().numpy() > 0
        log_mean_NK, loss_N = (output.cpu().numpy()[is_image] for output in outputs)
        sample_N = batch.sample_N[::views].cpu().numpy()[is_image]
        split = self.loader.workers.items.evaluation.images.split
        predictions = Predictions(
            sample_N, [split.key(int(s)) for s in sample_N], batch.label_N[::views].cpu().numpy()[is_image],
            torch.from_numpy(log_mean_NK).exp().float().numpy(), loss_N,
        )  # fmt: skip
        self.buffer.add(self.loader.numbers[batch_idx], predictions, [f._asdict() for f in self.loader.faults])
        now = time.monotonic()
        if self.world.leads and now - self._looked > _LOOK_SECONDS:
            self._looked = now
            self.progress.at(self.results.count() + self.buffer.images)


def _wait(results: Results, question: Question, progress: EvaluationProgress) -> None:
    """Until the parts of all ranks are there. Raises FailedRunError where none comes any more."""
    blocks = math.ceil(question.images / question.images_each)
    seen, changed = results.count(), time.monotonic()
    while seen < question.images or len(results.blocks()) < blocks:
        progress.at(seen)
        time.sleep(_LOOK_SECONDS / 5)
        if results.count() != seen:
            seen, changed = results.count(), time.monotonic()
        minutes = question.config.cluster.timeout_minutes
        if time.monotonic() - changed > 60 * minutes:
            raise FailedRunError(
                f"{question.images - seen:,} of {question.images:,} images are missing in {results.directory}, and no "
                f"rank has added any for {minutes:g} minutes (cluster.timeout_minutes); all nodes must see that "
                "directory; the same command goes on",
                code=AGAIN,
            )


def _finish(question: Question, results: Results, console: Console) -> None:
    """Put all together and score it. Raises DataError where more images are bad than the config allows."""
    predictions, faults = results.put_together()
    _report(faults, question, results.directory, console)
    top1, top5 = (wilson(int(predictions.hits(k).sum()), len(predictions)) for k in (1, 5))
    scores = {
        "checkpoint": question.checkpoint.name, "checkpoint_sha256": question.settings["checkpoint"],
        "step": question.step,
        "loss": float(predictions.losses().mean()) if len(predictions) else 0.0,
        "top1": top1.value, "top5": top5.value, "images": len(predictions),
        "top1_interval": [top1.low, top1.high], "top5_interval": [top5.low, top5.high],
        "left_out": len(faults), "split": question.source.name, "views": question.views,
        "statistics": question.settings["statistics"], "results": str(question.directory),
    }  # fmt: skip
    results.finish(predictions)
    write_atomically(results.directory / SCORES, (json.dumps(scores, indent=2) + "\n").encode())
    results.tidy()


def _report(faults: list[dict[str, Any]], question: Question, directory: Path, console: Console) -> None:
    """Write down and say which images are left out. Raises DataError for too many."""
    if not faults:
        return
    path, data = directory / BAD_SAMPLES, question.config.data
    write_atomically(path, "".join(json.dumps(fault) + "\n" for fault in faults).encode())
    for fault in faults:
        said = f"bad sample: {fault['shard']}: {fault['key']} at byte {fault['offset']}: {fault['reason']}"
        console.print(said, highlight=False, soft_wrap=True)
    console.print(f"evaluation leaves out {len(faults)} of {question.images:,} images, listed in {path}",
                  highlight=False, soft_wrap=True)  # fmt: skip
    kind = "validation" if question.source.is_own else question.source.name
    allowed, root = math.floor(data.bad_samples * question.images), question.source.dataset.location.root
    if len(faults) > allowed:
        raise DataError(
            f"{len(faults)} of {question.images:,} {kind} images cannot be used, data.bad_samples = "
            f"{data.bad_samples:g} allows {allowed}; {path} lists them: run `pipeline shards verify {root}`, "
            f"bring sound shards and remove {directory}, or raise data.bad_samples"
        )
