"""What a container commonly lacks for a training, said in a line each before the training begins.

    python -m pipeline.doctor.container recipe=bn_x5 data=imagenet    # what is given to `pipeline train`

It loads no library of training, ends in half a second, and never keeps a run from starting: what is a fault here the
run finds out itself.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.config import Config, ConfigError, compose_config, read_config
from pipeline.doctor.findings import OK, Finding, warning
from pipeline.doctor.machine import check_shared_memory, check_temporary, existing
from pipeline.launch.heartbeat import HEARTBEAT
from pipeline.launch.plan import worker_count
from pipeline.launch.redaction import without_secrets

_CARDS = "nvidia[0-9]*"  # /dev/nvidia0: what a container is given of a GPU


def hints(config: Config, environment: Mapping[str, str] = os.environ, *, dev: Path = Path("/dev"),
          root: Path = Path("/")) -> Iterator[Finding]:  # fmt: skip
    """Findings that are worth a line. dev, root: where devices and the container's own file system are."""
    gpus = 0 if config.cluster.accelerator == "cpu" else len(list(dev.glob(_CARDS)))
    yield from check_gpus(config.cluster.accelerator, gpus)
    ranks, workers = config.cluster.devices, worker_count(config, cuda=gpus > 0)
    if workers or (ranks > 1 and gpus):  # NCCL; gloo needs none
        images = -(-config.data.global_batch_size // config.world)
        images = min(images, config.data.micro_batch_size or images)
        found = check_shared_memory(ranks, workers, images * 3 * config.data.image_size**2, gpus, str(dev / "shm"))
        yield from (finding for finding in found if finding.state != OK)
    yield from check_directory(config.directory if config.run.id else Path(config.run.dir), root)
    yield from (finding for finding in check_temporary(environment) if finding.state != OK)
    yield from check_heartbeat(environment)


def check_gpus(accelerator: str, gpus: int) -> Iterator[Finding]:
    if gpus or accelerator == "cpu":
        return
    what = "which cluster.accelerator = cuda asks for" if accelerator == "cuda" else "so this trains on the CPU"
    yield warning("devices", f"no GPU is visible, {what}", "docker run --gpus all, or cluster.accelerator=cpu")


def check_directory(directory: Path, root: Path = Path("/")) -> Iterator[Finding]:
    """Can the run be written, and does it outlive the container?"""
    place = existing(directory)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(1024))
    except OSError as error:
        yield warning("run directory", f"run.dir: {place} cannot be written: {error.strerror}",
                      'docker run -v "$PWD:/scratch" --user "$(id -u):$(id -g)"')  # fmt: skip
        return
    if place.stat().st_dev == root.stat().st_dev:
        yield warning("run directory", f"{directory} lies in the container and is gone with it",
                      'docker run -v "$PWD:/scratch"')  # fmt: skip


def check_heartbeat(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Without the file the health check sees no training, and calls that healthy."""
    path = environment.get(HEARTBEAT)
    if path and not os.access(Path(path).parent, os.W_OK):
        yield warning("health", f"{path} cannot be written: a frozen training would count as healthy",
                      f"docker run --tmpfs {Path(path).parent}")  # fmt: skip


def main(words: Sequence[str]) -> int:
    files = [Path(word) for word in words if word.endswith((".yaml", ".yml")) and "=" not in word]
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    try:
        config = read_config(files[0], overrides) if files else compose_config(overrides)
    except ConfigError:
        return 0  # `train` will say so
    for finding in hints(config):
        line = f"{finding.name}: {finding.text}; {finding.way_out}"
        print(f"hint: {without_secrets(line)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
