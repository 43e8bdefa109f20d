"""Cross-entropy per image, scaled so that DDP's mean over ranks is the mean over the global batch.

Legend: N images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Loss:
    """label_smoothing: probability spread over all classes. auxiliary_weight: of an auxiliary head's loss."""

    label_smoothing: float = 0.0
    auxiliary_weight: float = 0.3

    def of_mixed(
        self, logits_NK: Tensor, auxiliary_NK: Tensor | None, label_N: Tensor, partner_N: Tensor, share_N: Tensor
    ) -> Tensor:
        """Loss of each image of two labels: share_N is the first one's, the rest the partner's; as of soft labels."""
        own_N, other_N = (self.per_image(logits_NK, auxiliary_NK, labels_N) for labels_N in (label_N, partner_N))
        share_N = share_N.to(own_N.dtype)
        return share_N * own_N + (1 - share_N) * other_N

    def per_image(self, logits_NK: Tensor, auxiliary_NK: Tensor | None, label_N: Tensor) -> Tensor:
        """Loss of each image (N,), in float32 at least; N may be 0."""
        loss_N = self._cross_entropy(logits_NK, label_N)
        if auxiliary_NK is not None:
            loss_N = loss_N + self.auxiliary_weight * self._cross_entropy(auxiliary_NK, label_N)
        return loss_N

    def _cross_entropy(self, logits_NK: Tensor, label_N: Tensor) -> Tensor:
        wide_NK = logits_NK if logits_NK.element_size() >= 4 else logits_NK.float()
        return functional.cross_entropy(wide_NK, label_N, reduction="none", label_smoothing=self.label_smoothing)


def share_of_global_mean(loss_N: Tensor, global_batch_size: int, world: int, pieces: int) -> Tensor:
    """What a rank differentiates: sum x world x pieces / global count.

    DDP divides gradients by `world` and accumulation divides the loss by `pieces`, so that together
    the gradient is that of the mean over the global batch, for any shares; an empty one adds 0.
    """
    return loss_N.sum() * (world * pieces / global_batch_size)
