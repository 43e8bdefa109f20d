"""Per-activation batch normalization: each channel and place has its own mean, variance, gamma and beta.

Ioffe & Szegedy 2015, section 3.2: after a convolution all pixels of a channel in all images are taken together; here
only those at one place are, and m is the number of images. It is the same normalization of a network without places:
that of the F = C H W features of an image. So the layer is SyncBatchNorm over F features, with its exchange, its
backward and its state_dict, whose vectors have F entries: that of channel c at row y and column x is (y W + x) C + c,
in which order channels-last tensors lie, so that nothing is copied to take them as features. There is H W times as
much to exchange: for module 5b at 224 pixels 1.3 MB a rank and direction instead of 26 kB, in as many exchanges.
Legend: N images, C channels, H, W pixels, F = C H W features.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from pipeline.norm.sync_batch_norm import SyncBatchNorm


class Places(NamedTuple):
    """The shape of an image's activations, which the layer is built for."""

    channels: int
    height: int
    width: int

    @property
    def features(self) -> int:
        return self.channels * self.height * self.width

    def flat(self, x_NCHW: Tensor) -> Tensor:
        """The features (N, F)."""
        return x_NCHW.permute(0, 2, 3, 1).reshape(len(x_NCHW), self.features)

    def back(self, y_NF: Tensor) -> Tensor:
        """The activations (N, C, H, W), channels last."""
        return y_NF.reshape(len(y_NF), self.height, self.width, self.channels).permute(0, 3, 1, 2)

    def by_place(self, vector_F: Tensor) -> Tensor:
        """A vector of the state_dict as (C, H, W)."""
        return vector_F.view(self.height, self.width, self.channels).permute(2, 0, 1)

    def check(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != tuple(self):
            raise ValueError(
                f"input of shape {tuple(x.shape)} does not fit a norm of each activation of {tuple(self)}, whose "
                "statistics belong to places; give images of the size that the network was built for, or build it "
                "with norms of whole channels"
            )


class PerActivationNorm(SyncBatchNorm):
    """Batch normalization of each activation of (N, C, H, W) over the images of all ranks of a group.

    places: C, H, W, to which its input is bound. Everything else is SyncBatchNorm's: eps, momentum, affine,
    track_running_stats, group_size, activation; a level may hold both kinds, and exchanges once. `fold` makes it one
    product and one sum; `revert` a PlainPerActivationNorm. Raises ValueError for an input of another shape.
    """

    def __init__(self, places: tuple[int, int, int], **options: Any):
        self.places = Places(*places)
        super().__init__(self.places.features, **options)
        self.reverts_to = partial(PlainPerActivationNorm, places=self.places)

    def flat(self, x: Tensor) -> Tensor:
        return self.places.flat(x)

    def back(self, y: Tensor) -> Tensor:
        return self.places.back(y)

    def _check(self, x: Tensor) -> None:
        self.places.check(x)

    def extra_repr(self) -> str:
        return f"{tuple(self.places)}, {super().extra_repr()}"


class PlainPerActivationNorm(nn.BatchNorm1d):
    """The same of the local batch by torch's own layer, for whoever wants no exchange; same tensors, same names."""

    def __init__(self, num_features: int, *, places: Places, **options: Any):
        super().__init__(num_features, **options)
        self.places = places
        self.converts_to = partial(PerActivationNorm, places)

    def forward(self, input: Tensor) -> Tensor:
        self.places.check(input)
        return self.places.back(super().forward(self.places.flat(input)))
