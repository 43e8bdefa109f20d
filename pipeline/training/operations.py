"""How many floating-point operations a training step is, and how many a device can do at most: MFU's two numbers."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.blocks import set_sample_keys

# Dense peaks in 1e12 operations a second, by what the vendor prints on its data sheets, without sparsity: bf16, and
# TF32, which torch's convolutions use for float32 (torch.backends.cudnn.allow_tf32). The first name that fits counts.
PEAKS = (
    ("H200", {"bf16": 989.0, "32": 494.0}),
    ("GH200", {"bf16": 989.0, "32": 494.0}),
    ("H100 PCIe", {"bf16": 756.0, "32": 378.0}),
    ("H100 NVL", {"bf16": 835.0, "32": 417.0}),
    ("H100", {"bf16": 989.0, "32": 494.0}),
    ("A100", {"bf16": 312.0, "32": 156.0}),
    ("A30", {"bf16": 165.0, "32": 82.0}),
    ("A10", {"bf16": 125.0, "32": 62.5}),
    ("L40S", {"bf16": 362.0, "32": 183.0}),
    ("L4", {"bf16": 121.0, "32": 60.0}),
)


def peak_operations(device: str, precision: str) -> float:
    """Operations a second of a device by its name, in a run's precision (32, bf16); 0 = not known, as of any CPU."""
    words = device.split()
    for name, peaks in PEAKS:
        if all(any(part == word or word.startswith(f"{part}-") for word in words) for part in name.split()):
            return peaks.get(precision, 0.0) * 1e12
    return 0.0


def operations_per_image(model: nn.Module, size: int) -> int:
    """Operations of a step, forward and backward, for an image of size x size pixels: two for each multiply-add.

    Those of convolutions and matrix products, as torch counts them on tensors without content; 0 where the model
    cannot be run on such. model: stays as it is; its norms must need no process group.
    """
    probe = copy.deepcopy(model).to("meta").train()
    images = 2
    set_sample_keys(probe, torch.zeros(images, dtype=torch.int64, device="meta"))
    dtype = next(probe.parameters()).dtype
    try:
        with FlopCounterMode(display=False) as counter:
            output = probe(torch.empty(images, 3, size, size, dtype=dtype, device="meta"))
            parts = output if isinstance(output, tuple) else (output,)
            sum(part.sum() for part in parts if part is not None).backward()
    except (RuntimeError, NotImplementedError, AssertionError, ValueError):
        return 0
    return int(counter.get_total_flops()) // images
