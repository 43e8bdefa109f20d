"""What a run begins from instead of random weights: those of a run, of an export, of torchvision or of Cadene's layout.

Every tensor has its place, or the run does not begin; the last layer alone is new where there are other classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.callbacks.population import running_averages
from pipeline.config import Config, ConfigError, completed, read_config
from pipeline.data.shards import file_sha256
from pipeline.export import ExportError
from pipeline.export.description import FOLDED, parse
from pipeline.export.layout_file import settings_of, write_table
from pipeline.export.weights import KEY, read_tensors
from pipeline.launch.plan import CONFIG, STARTED
from pipeline.models.layouts import EPS, OPTIONS, LayoutError, Mapped, from_cadene, is_cadene, mean_of
from pipeline.norm import SyncBatchNorm
from pipeline.training.checkpoint_io import AVERAGED, STAMP, weights_of

TABLE = "initial.csv"  # in the run's directory: each tensor of the file, where it went
_AUXILIARY = ("auxiliary.", "AuxLogits.", "aux1.", "aux2.")  # heads that help in training, ours and torchvision's
_TRACKED = "num_batches_tracked"  # files of old have none
_WRAPPERS = ("state_dict", "model")  # what others' checkpoints keep weights under
_PREFIXES = ("module.", "model.")  # what DDP and Lightning put before every name


def with_digest(config: Config) -> Config:
    """The config with the digest of model.init. A run that has begun knows it, and does not need the file any more.

    Raises ConfigError where the file is needed, and is none.
    """
    model, frozen = config.model, config.directory / CONFIG
    if not model.init or model.init_digest:
        return config
    if Path(model.init).is_file():
        return completed(config, model={"init_digest": file_sha256(Path(model.init))})
    if frozen.is_file() and (config.directory / STARTED).is_file():
        begun = read_config(frozen).model
        if begun.init == model.init:
            return completed(config, model={"init_digest": begun.init_digest})
    raise ConfigError(f"model.init = {model.init} is no file; give the .safetensors, .pth or .ckpt file to begin from")


@dataclass(frozen=True, slots=True)
class Initial:
    """layout: whose names the file has. rows: what went where. new: layers of ours that the file has not."""

    layout: str
    rows: list[Mapped]
    new: list[str]
    left: list[str] = field(default_factory=list)

    def line(self, config: Config) -> str:
        parts = [f"begins from {config.model.init} ({self.layout}): {len(self.rows)} layers loaded"]
        if self.new:
            parts.append(f"new: {', '.join(self.new)}, of {config.data.num_classes} classes")
        if self.left:
            parts.append(f"left out: {', '.join(self.left)}")
        return "; ".join(parts)

    def keep(self, directory: Path) -> None:
        """Write the table into the run's directory."""
        write_table([*self.rows, *(Mapped("", name, (), "new") for name in self.new),
                     *(Mapped(name, "", (), "left out") for name in self.left)], directory / TABLE)  # fmt: skip


def initialize(model: nn.Module, config: Config) -> Initial:
    """Load model.init into a model. Raises ConfigError for another file than the run was made with, or what lacks."""
    path = Path(config.model.init)
    try:
        if file_sha256(path) != config.model.init_digest:
            raise ConfigError(
                f"model.init = {path} is another file than the run was made with ({config.model.init_digest[:12]}); "
                "bring that one back, or start a new run"
            )
        content, header = read_tensors(path)
        layout, tensors, rows = _under_our_names(path, content, header, config, has_norms=_has_norms(model))
    except OSError as error:
        raise ConfigError(f"model.init = {path}: {error.strerror}; bring the file back, or start a new run") from None
    except (ExportError, LayoutError) as error:
        raise ConfigError(f"model.init: {error}") from None
    loaded, new, left = _matched(model, tensors, config)
    model.load_state_dict(loaded, strict=False)
    return Initial(layout, rows or _rows(loaded), new, left)


def _under_our_names(
    path: Path, content: Mapping[str, Any], header: dict[str, str], config: Config, *, has_norms: bool
) -> tuple[str, dict[str, Tensor], list[Mapped]]:
    """Whose layout it is, its tensors, and a row a layer where names or numbers change. Raises ConfigError."""
    if KEY in header:
        description = parse(header[KEY], str(path))
        if description.norms == FOLDED and has_norms:
            raise ConfigError(
                f"model.init = {path} has its norms folded, and cannot be trained on; export the run again with "
                "--format safetensors --keep-norms"
            )
        return f"export of {description.facts.get('run', description.name)}", dict(content), []
    layout = "weights"
    if STAMP in content and isinstance(content.get("state_dict"), dict):
        layout = f"checkpoint of a run, step {content.get('global_step', 0):,}"
        layout += ", averaged weights" if AVERAGED in content else ""
        if config.norm.frozen and has_norms:
            _check_statistics(path, content, config)
        content = weights_of(content)
    tensors = _unwrapped(path, content)
    if is_cadene(tensors):
        _check_cadene(path, config, mean_of(settings_of(header)["mean"]))
        ours, rows = from_cadene(tensors, config.data.std)
        return "Cadene's layout", ours, rows
    return layout, tensors, []


def _check_statistics(path: Path, checkpoint: Mapping[str, Any], config: Config) -> None:
    """Raises ConfigError for averages whose statistics are of an earlier step: nothing would ever correct them.

    A validation estimates them, and its callback keeps the step; those of frozen norms are as they were loaded.
    """
    was_frozen = checkpoint[STAMP].get("identity", {}).get("norm.frozen")
    if AVERAGED in checkpoint and not was_frozen and running_averages(checkpoint) is None:
        raise ConfigError(
            f"model.init = {path} holds averaged weights with statistics of an earlier step's, and norm.frozen = "
            f"{config.norm.frozen} would keep them; give best.ckpt, or one made by `pipeline average`"
        )


def _has_norms(model: nn.Module) -> bool:
    return any(isinstance(module, SyncBatchNorm) for module in model.modules())


def _unwrapped(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    for name in _WRAPPERS:
        if isinstance(content.get(name), dict):
            content = content[name]
    odd = [name for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if odd or not content:
        shown = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise ConfigError(
            f"model.init = {path} holds {shown}, and no tensors by name; give a state_dict, or a checkpoint"
        )
    tensors = dict(content)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _check_cadene(path: Path, config: Config, mean: list[float]) -> None:
    """Raises ConfigError naming every key that these weights need otherwise."""
    wanted: dict[str, Any] = {
        "name": "bn_inception", "width": 1.0, "activation": "relu", "response_norm": False,
        "per_activation": 0, **OPTIONS,
    }  # fmt: skip
    wrong = [f"model.{key}={_word(value)}" for key, value in wanted.items() if getattr(config.model, key) != value]
    if config.norm.eps != EPS:
        wrong.append(f"norm.eps={EPS:g}")
    if max(abs(here - there) for here, there in zip(config.data.mean, mean, strict=True)) > 1e-6:
        wrong.append(f"data.mean=[{','.join(f'{value:.8f}' for value in mean)}]")
    if wrong:
        raise ConfigError(
            f"model.init = {path} is BN-Inception in Cadene's layout, which another network cannot hold exactly; set "
            f"{' '.join(wrong)}"
        )


def _matched(
    model: nn.Module, tensors: Mapping[str, Tensor], config: Config
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """What is loaded by name, which layers are new, and which of the file are left out. Raises ConfigError."""
    last = _last_layer(model, config.data.num_classes)
    loaded: dict[str, Tensor] = {}
    new: dict[str, None] = {}
    faults: list[str] = []
    for name, ours in model.state_dict().items():
        theirs = tensors.get(name)
        layer = name.rpartition(".")[0]
        if theirs is not None and theirs.shape == ours.shape:
            loaded[name] = theirs
        elif name.endswith(_TRACKED) and theirs is None:
            loaded[name] = torch.zeros_like(ours)
        elif name.startswith(_AUXILIARY) or (layer == last and theirs is not None and _other_classes(theirs, ours)):
            new[layer] = None
        elif theirs is None:
            faults.append(f"{name} is missing")
        else:
            faults.append(f"{name} is {_shape(theirs)}, here {_shape(ours)}")
    left = [name for name in tensors if name not in model.state_dict()]
    faults += [f"{name} has no place" for name in left if not name.startswith(_AUXILIARY)]
    if faults:
        more = f" and {len(faults) - 6} more" if len(faults) > 6 else ""
        raise ConfigError(
            f"model.init = {config.model.init} does not fit {config.model.name} as it is configured: "
            f"{', '.join(faults[:6])}{more}; set model.* as the file has it"
        )
    return loaded, list(new), sorted({name.partition(".")[0] for name in left})


def _last_layer(model: nn.Module, num_classes: int) -> str:
    """The name of the layer that gives the classes."""
    found = [
        name
        for name, module in model.named_modules()
        if not name.startswith(_AUXILIARY)
        and isinstance(module, nn.Linear | nn.Conv2d)
        and module.weight.shape[0] == num_classes
    ]
    return found[-1] if found else ""


def _other_classes(theirs: Tensor, ours: Tensor) -> bool:
    """Whether two tensors of a last layer differ by the number of classes alone."""
    return theirs.shape[1:] == ours.shape[1:]


def _rows(loaded: Mapping[str, Tensor]) -> list[Mapped]:
    """A row for each layer, by its largest tensor."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in loaded.items():
        layer = name.rpartition(".")[0]
        shapes[layer] = max(shapes.get(layer, ()), tuple(tensor.shape), key=len)
    return [Mapped(layer, layer, shape, "as it is") for layer, shape in shapes.items()]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
