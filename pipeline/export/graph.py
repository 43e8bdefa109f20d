"""A network as a program of torch.export: PyTorch runs, compiles or serves it without our code."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, fx

from pipeline.export.deployed import Deployed
from pipeline.export.description import Description, ExportError

FILE = "model.pt2"
DESCRIPTION = "model.json"  # among the archive's extra files
BATCH = "batch"  # the dimension that is left open


def write(network: Deployed, example: Tensor, description: Description, path: Path) -> None:
    """The program, for any number of images. Raises ExportError."""
    program = traced(network, example)
    with quiet():
        torch.export.save(program, path, extra_files={DESCRIPTION: description.to_json()})


def traced(network: Deployed, example: Tensor) -> torch.export.ExportedProgram:
    """The program of two images or more, its batch left open. Raises ExportError."""
    with quiet():
        try:
            batch = torch.export.Dim(BATCH, min=1)
            program = torch.export.export(network, (example,), dynamic_shapes={"images": {0: batch}})
        except Exception as error:  # its dynamo has many kinds of its own
            reason = str(error).strip().splitlines()[0]
            raise ExportError(
                f"{type(network.network).__name__} cannot be traced by torch.export ({reason}); export it with "
                "--format safetensors"
            ) from None
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:  # places in files of the machine that exports
                node.meta.pop("stack_trace", None)
    return program


def load(path: Path) -> tuple[torch.nn.Module, int]:
    """The program as a module, and how many operations it has."""
    with quiet():
        program = torch.export.load(path)
        operations = sum(node.op == "call_function" for node in program.graph.nodes)
        return program.module(), operations


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's advice to its own developers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
