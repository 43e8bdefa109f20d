import pytest
import torch
from torch import nn

from pipeline.config import ConfigError, compose_config
from pipeline.run.assembly import check_sizes


class OfOneSize(nn.Module):
    """A network that looks at the size of its images, as torchvision's transformers do."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3, 2)

    def forward(self, x_NCHW):
        torch._assert(x_NCHW.shape[2] == 24, "Wrong image height!")
        return self.last(x_NCHW.mean((2, 3)))


def test_images_that_grow_are_refused_by_a_network_of_one_size_before_the_first_step():
    growing = ["data=cifar10", "augment.first_size=0.5", "augment.growth_epochs=2"]
    with pytest.raises(
        ConfigError, match=r"augment\.first_size = 0\.5: bn_inception takes no images of 12 pixels a side"
    ):
        check_sizes(compose_config(growing), OfOneSize())
    check_sizes(compose_config(growing), nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    check_sizes(compose_config(["data=cifar10"]), OfOneSize())
