"""The statistics that norms evaluate with, by the names of their buffers: kept, and used in place of others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.norm.collectives import average_over_world
from pipeline.norm.population import Norm

Statistics = Mapping[str, Tensor]  # by name, as "body.3a.conv1.norm.running_mean"; of a module, or of its state_dict
NAMES = ("running_mean", "running_var")


def statistics_among(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a state_dict."""
    return {name: value for name, value in state.items() if name.rpartition(".")[2] in NAMES}


@torch.no_grad()
def kept(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's own, on the CPU, averaged over groups of ranks, each of which has its own. A collective."""
    found = {name: buffer for name, _, buffer in _buffers(module)}
    if not found:
        return {}
    sizes = [buffer.numel() for buffer in found.values()]
    flat = average_over_world(torch.cat([buffer.flatten() for buffer in found.values()])).cpu()
    return {name: values.clone() for name, values in zip(found, torch.split(flat, sizes), strict=True)}


@contextmanager
def held(module: nn.Module, statistics: Statistics) -> Iterator[None]:
    """Let a module evaluate with these, and then with its own again. Raises ValueError where one is missing."""
    own = _buffers(module)
    if missing := [name for name, _, _ in own if name not in statistics]:
        raise ValueError(f"{len(missing)} statistics are missing, {missing[0]} the first; give all of a module")
    try:
        for name, norm, buffer in own:
            setattr(norm, name.rpartition(".")[2], statistics[name].to(buffer))
        yield
    finally:
        for name, norm, buffer in own:
            setattr(norm, name.rpartition(".")[2], buffer)


def _buffers(module: nn.Module) -> list[tuple[str, Norm, Tensor]]:
    """Name, norm and tensor of each, in the order of the modules."""
    return [
        (f"{name}.{kind}".lstrip("."), norm, buffer)
        for name, norm in module.named_modules()
        if isinstance(norm, Norm)
        for kind in NAMES
        if (buffer := getattr(norm, kind)) is not None
    ]
