"""What a config leaves to its data set: which classes, whose digest. Packed or indexed on first use."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.cli.progress import Progress

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.data.dataset import Dataset


def settled(config: Config) -> Config:
    """The config with what its data set decides."""
    return settle(config)[0]


def settle(config: Config, *, elsewhere: bool = False) -> tuple[Config, Dataset]:
    """The data set, packed or indexed on first use, and the config with what it decides: classes, digest.

    elsewhere: the run happens on other machines, which alone may know the variables in the name of its cache; here
    tables go to the default one then.
    """
    from pipeline.config import ConfigError, completed
    from pipeline.data.dataset import Location
    from pipeline.data.decode import DECODER
    from pipeline.data.preparation import ready_data
    from pipeline.data.read_ahead import check_room
    from pipeline.data.shards import MANIFEST, DataError, difference, read_manifest

    if config.model.init:
        from pipeline.run.initial import with_digest

        config = with_digest(config)
    data = config.data
    location = Location(*data.location)
    if location.unset_variables and elsewhere:
        location = replace(location, cache="")
    elif location.unset_variables and location.is_cached:
        raise ConfigError(location.unset_variables)
    with Progress("indexing", "shards") as progress:
        dataset = ready_data(
            location, source=data.source, workers=os.cpu_count() or 1, progress=progress,
            patient=bool(data.digest),  # a run that has begun waits for its server; who has mistyped a host does not
        )  # fmt: skip
    manifest = dataset.manifest
    if data.digest and data.digest != manifest.digest:
        known = (config.directory / MANIFEST).is_file()
        what = difference(read_manifest(config.directory), manifest) if known else "its digest differs"
        raise DataError(
            f"data.root = {data.root} holds another data set than this run began with ({what}); bring that one back"
        )
    if data.global_batch_size > manifest.count("train"):
        raise ConfigError(
            f"data.global_batch_size = {data.global_batch_size} exceeds the {manifest.count('train')} training images; "
            "lower it"
        )
    if dataset.cache is not None:
        check_room(dataset.cache.limit, manifest.splits["train"], data.window)
    classes = data.num_classes or len(manifest.classes)
    for split in ("train", "val"):  # labels within the classes
        dataset.split(split, classes)
    if config.model.name not in ("bn_inception", "inception", "bn_mlp", "mlp"):  # torchvision's list takes seconds
        from pipeline.models.registry import check_name

        try:
            check_name(config.model.name)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return completed(
        config, data={"num_classes": classes, "digest": manifest.digest, "decoder": data.decoder or DECODER}
    ), dataset
