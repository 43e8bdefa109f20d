"""Imported once by the server that test ranks are forked from, so that a rank starts in milliseconds."""

import lightning  # noqa: F401
import torch  # noqa: F401
import torchvision  # noqa: F401

import pipeline.doctor.nodes
import pipeline.run.evaluating  # noqa: F401
