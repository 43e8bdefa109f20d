"""Synchronized batch normalization: knows nothing of images, configuration or Lightning."""

from pipeline.norm.folding import fold
from pipeline.norm.freezing import freeze
from pipeline.norm.moments import Moments, batch_moments, merge
from pipeline.norm.per_activation import PerActivationNorm
from pipeline.norm.sync_batch_norm import SyncBatchNorm, SyncBatchNorm2d, convert, revert

__all__ = [
    "Moments", "PerActivationNorm", "SyncBatchNorm", "SyncBatchNorm2d", "batch_moments", "convert", "fold", "freeze",
    "merge", "revert",
]  # fmt: skip
