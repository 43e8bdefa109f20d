"""Runs that never trained: a config, and a checkpoint whose norms are not as they were born."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.cli.settling import settled
from pipeline.config import Config, compose_config, identity
from pipeline.launch.plan import open_run
from pipeline.run.assembly import assemble
from pipeline.training.checkpoint_io import write_checkpoint
from pipeline.world import World

NETWORKS = {
    "bn_inception": ["model.stem=separable", "model.width=0.25", "data.image_size=64", "model.dropout=0.1",
                     "model.auxiliary_head=true"],
    "inception": ["recipe=inception", "model.stem=small", "model.width=0.125", "data.image_size=16"],
    "single activations": ["model.stem=small", "model.width=0.125", "data.image_size=16", "model.per_activation=2"],
    "resnet50": ["model.name=resnet50", "data.image_size=32"],
}  # fmt: skip


def run_of(shards: Path, directory: Path, *overrides: str, step: int = 7) -> Config:
    """An opened run on the test's images, with one checkpoint."""
    words = [
        "recipe=bn_x5", "data=folder", f"data.root={shards}", f"run.dir={directory}", "run.id=first",
        "data.global_batch_size=24", "norm.precise_images=48", "trainer.threads=1", "cluster.accelerator=cpu",
        "tracking.mode=disabled", *overrides,
    ]  # fmt: skip
    config = open_run(settled(compose_config(words)))
    model = assemble(config, World()).classifier
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.1, 0.1, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    content = {"state_dict": model.state_dict(), "global_step": step}
    write_checkpoint(content, config.directory / "checkpoints" / f"step-{step:08d}.ckpt", identity(config))
    return config
