"""The Lightning module: what a step and a validation are, with no device, rank or format in sight.

Legend: N images, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import lightning
import torch
from torch import Tensor, nn

from pipeline.evaluation.metrics import Scores, Sums
from pipeline.models.blocks import set_sample_keys
from pipeline.models.inception import Logits
from pipeline.training.averaging import Averaging
from pipeline.training.checkpoint_io import AVERAGED
from pipeline.training.loss import Loss, share_of_global_mean
from pipeline.training.optimizer import Descent, build_optimizer
from pipeline.training.schedule import Schedule


class Batch(Protocol):
    """What a step reads of a batch; data/batch.py makes them."""

    @property
    def image_NCHW(self) -> Tensor: ...  # uint8

    @property
    def label_N(self) -> Tensor: ...

    @property
    def key_N(self) -> Tensor: ...  # int64, one for each image and epoch

    @property
    def variation_NV(self) -> Tensor: ...  # how each image is varied on the device

    @property
    def weight_N(self) -> Tensor: ...  # 1 for an image, 0 for padding

    @property
    def partner_N2(self) -> Tensor: ...  # rows further on where an image's partner is, and its label

    @property
    def mix_N5(self) -> Tensor: ...  # first the share of an image's own label


class Classifier(lightning.LightningModule):
    """A model, its loss, and its optimizer on a schedule.

    prepare: makes the model's input of a batch's images and variations, in the dtype it is given. mix: blends each
    prepared image with its partner, in training steps alone; None = the images are not mixed. averaging: of the
    weights; None = there is none.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        prepare: nn.Module,
        loss: Loss,
        schedule: Schedule,
        descent: Descent,
        world: int,
        pieces: int,
        mix: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        averaging: Averaging | None = None,
    ):
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)
        self.loss, self.schedule = loss, schedule
        self.descent, self.world, self.pieces = descent, world, pieces
        self.prepare, self.mix = prepare, mix
        self.averaging = averaging
        self.step_sums: Sums | None = None  # of this rank, since the last report
        self.validation_sums: list[Sums] = []
        self.scores: Scores | None = None  # of the last validation: of averaged weights where there are some
        self.trained_scores: Scores | None = None  # then those of the weights that are trained
        self.scores_beside: Scores | None = None  # of the trained ones, with other statistics
        self.skips = False  # the batch at hand is not trained on: a step that changes nothing

    def forward(self, batch: Batch, *, mixed: bool = False) -> Logits:
        dtype = next(self.model.parameters()).dtype
        with torch.no_grad():
            image_NCHW = self.prepare(batch.image_NCHW, batch.variation_NV, dtype)
            if mixed and self.mix is not None:
                image_NCHW = self.mix(image_NCHW, batch.partner_N2, batch.mix_N5)
        set_sample_keys(self.model, batch.key_N)
        output = self.model(image_NCHW)
        return output if isinstance(output, Logits) else Logits(output)

    def training_step(self, batch: Batch, number: int) -> Tensor:
        if self.skips:
            return torch.zeros((), device=self.device, requires_grad=True)  # no weight gets a gradient
        logits_NK, auxiliary_NK = self(batch, mixed=True)
        label_N = batch.label_N
        if self.mix is None:
            loss_N = self.loss.per_image(logits_NK, auxiliary_NK, label_N)
        else:
            share_N, partner_N = batch.mix_N5[:, 0], batch.partner_N2[:, 1]
            loss_N = self.loss.of_mixed(logits_NK, auxiliary_NK, label_N, partner_N, share_N)
            label_N = torch.where(share_N >= 0.5, label_N, partner_N)  # what training scores are counted against
        self._training_sums().add(loss_N, logits_NK, label_N, batch.weight_N)
        return share_of_global_mean(loss_N, self.schedule.global_batch_size, self.world, self.pieces)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.averaging is not None:  # here, and in no hook behind it: those come after the step's checkpoint
            self.averaging.update(self.model, self.trainer.global_step + 1)

    def on_fit_start(self) -> None:
        if self.averaging is not None:
            self.averaging.begin(self.model)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.averaging is not None:
            checkpoint[AVERAGED] = {f"model.{name}": value for name, value in self.averaging.state.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.averaging is not None and AVERAGED in checkpoint:
            self.averaging.load({name.removeprefix("model."): v for name, v in checkpoint[AVERAGED].items()})

    def on_validation_epoch_start(self) -> None:
        self.validation_sums = [Sums(self.device) for _ in range(1 if self.averaging is None else 2)]

    def validation_step(self, batch: Batch, number: int) -> None:
        self.score(batch, self.validation_sums[0])
        if self.averaging is not None:
            with self.averaging.applied(self.model):
                self.score(batch, self.validation_sums[1])

    def score(self, batch: Batch, sums: Sums) -> None:
        """Count a batch that is evaluated."""
        logits_NK = self(batch).main_NK
        loss_N = self.loss.per_image(logits_NK, None, batch.label_N)
        sums.add(loss_N, logits_NK, batch.label_N, batch.weight_N)

    def on_validation_epoch_end(self) -> None:
        *trained, self.scores = [sums.merged() for sums in self.validation_sums]
        self.trained_scores = trained[0] if trained else None

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.descent)
        # A function, not the object: the scheduler would save the object's __dict__ with its own state.
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule(step))  # noqa: PLW0108
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def taken_training_scores(self) -> Scores:
        """Scores of the images trained on since the last call. A collective."""
        scores = self._training_sums().merged()
        self._training_sums().reset()
        return scores

    def open_training_sums(self) -> list[float]:
        """The sums behind the scores to be taken next, over all ranks. A collective."""
        return self._training_sums().totals()

    def resume_training_scores(self, totals: list[float]) -> None:
        """Go on from sums that were open when a checkpoint was written; for one rank."""
        sums = self._training_sums()
        sums.values_4 += torch.tensor(totals, dtype=torch.float64, device=sums.values_4.device)

    def _training_sums(self) -> Sums:
        if self.step_sums is None:
            self.step_sums = Sums(self.device)
        return self.step_sums
