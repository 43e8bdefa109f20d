"""A network as an ONNX file, for any runtime. Import it where ONNX is asked for: its libraries are an extra."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor

from pipeline.export.deployed import Deployed
from pipeline.export.description import Description, ExportError
from pipeline.export.graph import BATCH, quiet, traced

FILE = "model.onnx"
OPSET = 18  # onnxruntime 1.14 and later
IMAGES, LOGITS = "images", "logits"


def write(network: Deployed, example: Tensor, description: Description, path: Path) -> None:
    """One file, weights included, for any number of images; the description is in its metadata. Raises ExportError."""
    program = traced(network, example)
    logger = logging.getLogger("torch.onnx")
    level, logger.level = logger.level, logging.ERROR
    try:
        with quiet():
            made = torch.onnx.export(
                program, dynamo=True, input_names=[IMAGES], output_names=[LOGITS], opset_version=OPSET,
                dynamic_shapes={"images": {0: BATCH}}, optimize=True, verbose=False,
            )  # fmt: skip
    except Exception as error:  # of torch.onnx, onnxscript and what they call
        reason = str(error).strip().splitlines()[0]
        raise ExportError(
            f"ONNX has no form for this network ({reason}); export it with --format torch-export"
        ) from None
    finally:
        logger.level = level
    assert made is not None
    proto = made.model_proto
    for node in [*proto.graph.node, *(node for function in proto.functions for node in function.node)]:
        del node.metadata_props[:]  # places in files of the machine that exports
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info, *proto.graph.initializer):
        del value.metadata_props[:]
    onnx.helper.set_model_props(proto, {"pipeline": description.to_json()})
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString())


def load(path: Path, threads: int = 0) -> tuple[Callable[[Tensor], Tensor], int]:
    """A session of onnxruntime on the CPU as a function, and how many nodes the graph has. threads: 0 = its choice."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits_NK,) = session.run([LOGITS], {IMAGES: images.contiguous().numpy()})
        return torch.from_numpy(logits_NK)

    return run, sum(kinds(path).values())


def kinds(path: Path) -> Counter[str]:
    """How many nodes of each kind a file holds."""
    model: Any = onnx.load(path)
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    return Counter(node.op_type for node in nodes)
