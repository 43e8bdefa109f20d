"""A run's network, handed to export: statistics as in evaluation, real images to compare on, and what the card says."""

from __future__ import annotations

import copy
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pipeline.config import Config, ConfigError, completed
from pipeline.data.batch import Batch
from pipeline.data.images import Fault
from pipeline.data.loader import POPULATION_EPOCH, TrainShares
from pipeline.data.shards import DataError
from pipeline.export import card, graph, layout_file, parity, publication, speed, weights
from pipeline.export.deployed import Deployed, folded, stripped
from pipeline.export.description import FOLDED, KEPT, PIXELS, Description, ExportError, Preprocessing
from pipeline.norm.apart import estimate_apart
from pipeline.run import load_weights
from pipeline.run.assembly import Assembly, accelerator_of, assemble, model_options
from pipeline.run.evaluating import averages, statistics_batch
from pipeline.run.failures import interruptible
from pipeline.run.origin import origin
from pipeline.run.reports import table
from pipeline.training.classifier import Classifier
from pipeline.world import World

SAFETENSORS, TORCH_EXPORT, ONNX, CADENE = FORMATS = ("safetensors", "torch-export", "onnx", "cadene")
_EXAMPLES = 2  # images that a graph is traced with: of one, an exporter takes the batch for a constant
_BATCH = 16

Progress = Callable[[int, int], None]
Form = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Request:
    """images: of the validation set, that parity is judged by. speed: to be measured. output: None = in the run."""

    format: str
    output: Path | None = None
    images: int = 64
    keep_norms: bool = False
    takes: str = PIXELS
    speed: bool = False
    force: bool = False

    def directory(self, config: Config) -> Path:
        return self.output or config.directory / "export" / self.format


def check(config: Config, request: Request) -> None:
    """Raises ConfigError or ExportError for what can be known before anything is computed."""
    if request.keep_norms and request.format != SAFETENSORS:
        raise ConfigError(
            f"--keep-norms is of --format safetensors; {request.format} {_NORMS[request.format]}: leave it out"
        )
    if request.takes != PIXELS and request.format not in (TORCH_EXPORT, ONNX):
        raise ConfigError(f"--input is of torch-export and onnx, which hold a graph; {request.format} holds weights")
    publication.check_free(request.directory(config), force=request.force)
    if request.format == CADENE:
        layout_file.check(config.model.name, model_options(config), config.data.image_size)
    if request.format == ONNX:
        _onnx()


def export(
    config: Config,
    console: Console,
    *,
    checkpoint: Path,
    request: Request,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write, load anew, compare, publish. Raises ExportError, DataError or ConfigError, and then leaves nothing."""
    check(config, request)
    with interruptible():  # what is half written goes with a signal, too
        run = assemble(_alone(config), World())
        state = load_weights(run.classifier, checkpoint)
        classifier = run.classifier.to(accelerator_of(config)).eval()
        if config.norm.precise_images:
            _set_statistics(classifier, run, config, progress)
        else:
            classifier.model.load_state_dict(averages(state), strict=False)
        _export(run, console, checkpoint, state, request, progress)


def _export(
    run: Assembly, console: Console, checkpoint: Path, state: Mapping[str, Any], request: Request, progress: Progress
) -> None:
    config, classifier = run.config, run.classifier.cpu()
    pixel_NCHW = validation_pixels(run, request.images)
    trained_NK = _logits(partial(_trained, classifier), pixel_NCHW)
    exact_NK = _logits(partial(_trained, copy.deepcopy(classifier).double()), pixel_NCHW)
    description = _described(run, request, checkpoint, state)
    with publication.published(request.directory(config), force=request.force) as place:
        file, size = _written(classifier, pixel_NCHW, description, request, place)
        forms, nodes = _loaded(file, request, description)
        agreement = parity.compared(exact_NK, trained_NK, _logits(forms[request.format], pixel_NCHW))
        parity.check(agreement, f"{request.format} of {config.run.id}")
        facts = {
            "file": f"{file.name}, {size / 1e6:,.1f} MB", "parameters": f"{_parameters(classifier):,}",
            _COUNTED[request.format]: f"{nodes:,}",
            **{name: str(value) for name, value in description.facts.items()},
        }  # fmt: skip
        speeds, machine = [], ""
        if request.speed:
            machine = speed.machine()
            rivals = _running(_rivals(classifier, description), pixel_NCHW, console)
            speeds = speed.measured({**rivals, **forms}, pixel_NCHW, progress=progress)
        text = card.card(request.format, description, facts, agreement, speeds, machine)
        (place / publication.CARD).write_text(text, encoding="utf-8")
        (place / publication.MARK).write_text(description.to_json(indent=2) + "\n", encoding="utf-8")
    directory = request.directory(config)
    shown = {name: value for name, value in facts.items() if name not in _CARD_ALONE}
    console.print(table(f"{request.format} of {config.run.id}", {
        **shown, "parity": str(agreement), "directory": str(directory),
    }))  # fmt: skip
    if speeds:
        console.print(_speed_table(speeds, machine))


def _alone(config: Config) -> Config:
    """The run as one process has it, whose batches for statistics are an evaluation's."""
    return completed(config, cluster={"devices": 1, "nodes": 1}, norm={"group_size": 0, "group_images": 0})


def _set_statistics(classifier: Classifier, run: Assembly, config: Config, progress: Progress) -> None:
    """Population statistics, with the bits that an evaluation of the same checkpoint gives them on this device."""
    each, shares = statistics_batch(config), run.data.train_loader.shares
    batching = replace(run.data.batching, micro_batch_size=0, global_batch_size=each)
    train = TrainShares(shares.images, shares.augment, batching)
    count = min(len(shares.images.split) // each, math.ceil(config.norm.precise_images / each))
    device = next(classifier.model.parameters()).device

    def batches() -> Iterator[tuple[int, Batch]]:
        for number in range(count):
            batch, _ = train.load(POPULATION_EPOCH, number)
            yield number, Batch(*(tensor.to(device) for tensor in batch))
            progress((number + 1) * each, count * each)

    is_mixed = config.trainer.precision == "bf16"
    with (
        _deterministic(is_so=config.trainer.deterministic),
        torch.autocast(device.type, torch.bfloat16) if is_mixed else nullcontext(),
    ):
        estimate_apart(classifier.model, batches(), count, classifier, form=config.norm.precise_form)


@contextmanager
def _deterministic(*, is_so: bool) -> Iterator[None]:
    """With algorithms as an evaluation's trainer chooses them."""
    if is_so:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    was_so, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(is_so)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_so, warn_only=warns)


def validation_pixels(run: Assembly, count: int) -> Tensor:
    """Evaluation crops (N, 3, size, size), uint8, of images from all over the validation set. Raises DataError."""
    evaluation = run.data.val_loader.workers.items.evaluation
    total = len(evaluation.images.split)
    chosen = np.unique(np.linspace(0, total - 1, min(max(count, _EXAMPLES), total)).round().astype(int))
    found = [evaluation.images.load(int(sample), run.data.crop.crop) for sample in chosen]
    crops = [torch.from_numpy(image.copy()) for image in found if not isinstance(image, Fault)]
    if len(crops) < _EXAMPLES:
        raise DataError(
            f"data.root = {run.config.data.root} has {len(crops)} sound validation images of {len(chosen)} that were "
            f"looked at, and {_EXAMPLES} at least are needed to compare on; run `pipeline shards verify --decode` on it"
        )
    return torch.stack(crops).permute(0, 3, 1, 2).contiguous()


def _trained(classifier: Classifier, pixel_NCHW: Tensor) -> Tensor:
    """Logits of the network as training has it: its norms in their places, its own preparation and dtype."""
    dtype = next(classifier.model.parameters()).dtype
    unchanged_NV = torch.tensor([[0.0, 1, 1, 1]], dtype=torch.float64).expand(len(pixel_NCHW), 4)
    pixels = pixel_NCHW.contiguous(memory_format=torch.channels_last)
    output = classifier.model(classifier.prepare(pixels, unchanged_NV, dtype))
    logits_NK: Tensor = output[0] if isinstance(output, tuple) else output
    return logits_NK


@torch.no_grad()
def _logits(form: Form, images: Tensor) -> Tensor:
    return torch.cat([form(part) for part in torch.split(images, _BATCH)])


def _described(run: Assembly, request: Request, checkpoint: Path, state: Mapping[str, Any]) -> Description:
    config = run.config
    data = config.data
    return Description(
        name=config.model.name,
        options={name: value for name, value in model_options(config).items() if name != "auxiliary_head"},
        num_classes=data.num_classes,
        preprocessing=Preprocessing(data.image_size, data.evaluation_crop, list(data.mean), list(data.std)),
        classes=[[c.id, c.name] for c in run.data.dataset.manifest.classes],
        takes=request.takes,
        norms=KEPT if request.keep_norms or request.format == CADENE else FOLDED,
        eps=config.norm.eps,
        facts=origin(run.config, checkpoint, state),
    )


def _written(
    classifier: Classifier, pixel_NCHW: Tensor, description: Description, request: Request, place: Path
) -> tuple[Path, int]:
    """The file, and its bytes."""
    model = classifier.model
    mean, std = description.preprocessing.mean, description.preprocessing.std
    if request.format == CADENE:
        file = place / layout_file.FILE
        layout_file.write(stripped(model), description, file)
        return file, file.stat().st_size
    network = Deployed(stripped(model) if request.keep_norms else folded(model), mean, std, request.takes).eval()
    example = pixel_NCHW[:_EXAMPLES] if request.takes == PIXELS else network.normalized(pixel_NCHW[:_EXAMPLES])
    if request.format == SAFETENSORS:
        file = place / weights.FILE
        weights.write(network, description, file)
    elif request.format == TORCH_EXPORT:
        file = place / graph.FILE
        graph.write(network, example, description, file)
    else:
        onnx_file = _onnx()
        file = place / onnx_file.FILE
        onnx_file.write(network, example, description, file)
    return file, file.stat().st_size


def _loaded(file: Path, request: Request, description: Description) -> tuple[dict[str, Form], int]:
    """The file, loaded anew, as a function of pixels; and how many nodes it has, or tensors."""
    form: Form
    if request.format == CADENE:
        form, nodes = layout_file.load(file)
    elif request.format == SAFETENSORS:
        form, nodes = weights.load(file)[0], len(weights.read_tensors(file)[0])
    elif request.format == TORCH_EXPORT:
        form, nodes = graph.load(file)
    else:
        form, nodes = _onnx().load(file, torch.get_num_threads())
    if request.takes == PIXELS:
        return {request.format: form}, nodes
    preprocessing = description.preprocessing
    normalized = Deployed(torch.nn.Identity(), preprocessing.mean, preprocessing.std, PIXELS).normalized
    return {request.format: lambda pixels: form(normalized(pixels))}, nodes


def _rivals(classifier: Classifier, description: Description) -> dict[str, Form]:
    """What a file's speed is held against: the network in PyTorch, as trained, folded, and folded and compiled."""
    mean, std = description.preprocessing.mean, description.preprocessing.std
    network = Deployed(folded(classifier.model), mean, std, PIXELS).eval().to(memory_format=torch.channels_last)
    trained = Deployed(stripped(classifier.model), mean, std, PIXELS).eval().to(memory_format=torch.channels_last)
    compiled = torch.compile(network, dynamic=False)
    return {"eager": trained, "eager, folded": network, "torch.compile, folded": compiled}


def _running(rivals: Mapping[str, Form], pixel_NCHW: Tensor, console: Console) -> dict[str, Form]:
    """Those that run here at each batch size; of others it is said why not, and the file is kept without them."""
    found: dict[str, Form] = {}
    for name, rival in rivals.items():
        try:
            with torch.no_grad():
                for batch in speed.BATCHES:
                    rival(speed.batch_of(pixel_NCHW, batch))
        except Exception as error:  # of a compiler, whose tools a machine may not have
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            console.print(f"--speed leaves out {name}, which does not run here: {reason}",
                          highlight=False, markup=False, soft_wrap=True)  # fmt: skip
        else:
            found[name] = rival
    return found


def _onnx() -> Any:
    """The module that writes ONNX. Raises ExportError where its libraries are missing."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"not installed, and needed for --format onnx: {', '.join(missing)}; pip install -r requirements/onnx.txt, "
            "or choose safetensors or torch-export"
        )
    from pipeline.export import onnx_file

    return onnx_file


def _parameters(classifier: Classifier) -> int:
    return sum(p.numel() for name, p in classifier.model.named_parameters() if not name.startswith("auxiliary."))


def _speed_table(speeds: Sequence[speed.Speed], machine: str) -> Table:
    shown = Table("form", "batch", "images/s", "slowest to fastest", "rounds", title=machine, title_justify="left")
    for s in speeds:
        shown.add_row(s.form, str(s.batch), f"{s.median:,.1f}", f"{s.low:,.1f} to {s.high:,.1f}", str(s.rounds))
    return shown


_COUNTED: Mapping[str, str] = {SAFETENSORS: "tensors", TORCH_EXPORT: "nodes", ONNX: "nodes", CADENE: "tensors"}
_NORMS = {TORCH_EXPORT: "has them folded", ONNX: "has them folded", CADENE: "has them always"}
_CARD_ALONE = ("data digest", "versions", "seed", "precision in training")
