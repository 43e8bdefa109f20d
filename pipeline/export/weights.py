"""Files of tensors: safetensors written and read, PyTorch's own read. No code in them is ever run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pipeline import models
from pipeline.export.deployed import Deployed, folded, stripped
from pipeline.export.description import FOLDED, Description, ExportError, parse
from pipeline.models.registry import MODELS
from pipeline.norm import PerActivationNorm, SyncBatchNorm, convert

FILE = "model.safetensors"
KEY = "pipeline"  # of the description, in the header
SUFFIX = ".safetensors"


def write(network: Deployed, description: Description, path: Path) -> None:
    """The network's tensors under the names of its state_dict, with its description in the header."""
    write_tensors(network.network.state_dict(), {KEY: description.to_json()}, path)


def write_tensors(tensors: Mapping[str, Tensor], header: Mapping[str, str], path: Path) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.write_bytes(save(plain, metadata={"format": "pt", **header}))


def load(path: str | Path) -> tuple[Deployed, Description]:
    """The network in a file of `pipeline export --format safetensors`, in evaluation mode. Raises ExportError.

    It takes uint8 pixels (N, 3, size, size) in RGB; `.network` is the bare one.
    """
    tensors, header = read_tensors(Path(path))
    if KEY not in header:
        raise ExportError(f"{path} holds tensors alone, and does not say of which network; give model.init={path}")
    description = parse(header[KEY], str(path))
    try:
        network = built(description)
    except (ValueError, TypeError) as error:
        raise ExportError(
            f"{path} describes a network that this version cannot build ({error}); read it with the one that wrote it"
        ) from None
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ExportError(f"{path} does not hold the {description.name} that it describes: {reason}") from None
    preprocessing = description.preprocessing
    return Deployed(network, preprocessing.mean, preprocessing.std, description.takes).eval(), description


def built(description: Description) -> nn.Module:
    """A network of that description, in evaluation mode, with weights of its own."""
    norm = partial(SyncBatchNorm, eps=description.eps)
    options: dict[str, Any] = dict(description.options)
    if options.get("per_activation"):
        options["place_norm"] = partial(PerActivationNorm, eps=description.eps)
    if description.name in MODELS:
        network = models.build(description.name, num_classes=description.num_classes, norm=norm, **options)
    else:
        network = convert(models.build(description.name, num_classes=description.num_classes, **options))
    return folded(network) if description.norms == FOLDED else stripped(network)


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What a file holds by name, and its header (empty for PyTorch's). Raises ExportError.

    Of PyTorch's files only those are read that hold tensors and plain values (`weights_only`).
    """
    try:
        if path.suffix == SUFFIX:
            with safe_open(path, framework="pt") as file:
                names, header = file.keys(), file.metadata()
                return {name: file.get_tensor(name) for name in names}, header or {}
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ExportError(f"{path}: {error.strerror or error}; give a file of weights") from None
    except SafetensorError as error:
        raise ExportError(f"{path} is no whole safetensors file ({error}); fetch or export it again") from None
    except Exception:  # torch and its unpickler have many ways to say so
        raise ExportError(
            f"{path} is damaged, or holds more than tensors and plain values, and is not loaded; give a .safetensors "
            "file, or a .pth or .ckpt that torch.load(weights_only=True) reads"
        ) from None
    if not isinstance(content, dict):
        raise ExportError(f"{path} holds a {type(content).__name__}, no tensors by name; save a state_dict")
    return content, {}
