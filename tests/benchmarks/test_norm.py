"""The tables of `bench norm`: what they count is what there is."""

import io
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from pipeline import cli
from pipeline.benchmarks import layers
from pipeline.benchmarks.layers import shapes_of_network
from pipeline.benchmarks.passes import passes


def test_shapes_are_those_of_the_69_norms():
    shapes = shapes_of_network(224)
    assert sum(shapes.values()) == 69
    assert shapes[64, 112, 112] == 1
    assert shapes[352, 7, 7] == 2  # the 1x1 branches of 5a and 5b
    assert sum(channels * count for (channels, _, _), count in shapes.items()) == 9_952


def test_passes_count_what_reads_and_writes_the_whole_activation():
    x = torch.randn(4, 3, 5, 5)
    assert passes(lambda x: x.transpose(0, 1).transpose(0, 1), x) == (0, 0)
    relu_reads, relu_writes = passes(torch.relu, x)
    assert (relu_reads, relu_writes) == (3, 2)  # x; dy and y; y and dx
    norm = nn.BatchNorm2d(3)
    with_norm = passes(lambda x: torch.relu(norm(x)), x)
    assert with_norm[0] > relu_reads
    assert with_norm[1] > relu_writes


def test_the_table_says_what_every_form_exchanges(tmp_path: Path):
    words = ["bench", "norm", "--processes", "2", "--images", "1", "--size", "32", "--width", "0.125",
             "--repeats", "5"]  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-m", "pipeline", *words]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True, timeout=280)
    rows = {
        cells[0].strip(): [cell.strip() for cell in cells[1:]]
        for cells in (line.strip("│").split("│") for line in ran.stdout.splitlines() if line.startswith("│"))
    }
    assert [rows[form][1] for form in ("local", "torch's form", "layer", "level", "level overlapped")] == [
        "0", "138", "138", "66", "66",
    ]  # fmt: skip
    assert float(rows["level overlapped"][8]) < 1e-10  # gradients, of torch's


def test_a_layer_is_measured_beside_torchs(monkeypatch):
    monkeypatch.setattr(layers, "shapes_of_network", lambda size: {(3, 4, 4): 2, (5, 2, 2): 1})
    found = layers.measure(images=2, size=32, dtype=torch.float32, device=torch.device("cpu"), repeats=5)
    compiled = [] if layers.why_not_compiled(torch.device("cpu")) else ["the same compiled"]  # it needs g++
    assert [list(layer.seconds) for layer in found] == [["ours, plain", "F.batch_norm, relu", *compiled]] * 2
    assert all(len(seconds) == 5 for layer in found for seconds in layer.seconds.values())
    shown = io.StringIO()
    Console(width=140, file=shown).print(layers.report(found, images=2, dtype=torch.float32))
    last = next(line for line in shown.getvalue().splitlines() if line.startswith("│ all"))
    assert last.split("│")[2].strip() == "3"


def test_a_device_that_is_not_there_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "norm", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "pipeline: --device cuda, but torch finds no CUDA device; use cpu\n"


def test_a_layer_with_one_value_a_channel_is_refused_as_torch_would_refuse_it(capsys):
    assert cli.main(["bench", "norm", "--layers", "1", "--size", "32"]) == 2
    assert capsys.readouterr().err == (
        "pipeline: --layers 1 of 32 pixels a side leaves one value a channel in the last layers, which torch refuses; "
        "give 2 or more\n"
    )
