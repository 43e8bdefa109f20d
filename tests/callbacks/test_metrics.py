"""The documented names are the names."""

import json
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pipeline.callbacks.journal import COLUMNS, Row, read_journal
from pipeline.callbacks.metrics import AXES, METRICS, OF_EACH_GPU, ONLY_IN_CSV, ONLY_IN_WANDB, SYSTEM, wandb_name
from pipeline.callbacks.samples import wandb_name as wandb_name_of_node
from pipeline.callbacks.segments import values
from pipeline.callbacks.throughput import Spent
from pipeline.callbacks.tracking import Circumstance, Tracking
from pipeline.evaluation.metrics import Scores
from pipeline.launch.plan import read_record
from pipeline.models import build
from pipeline.norm import SyncBatchNorm, revert
from pipeline.training.operations import operations_per_image, peak_operations
from tests.multiprocess.ranks import run_ranks
from tests.multiprocess.test_resume import config, train_rank

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def documented() -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): [name.strip("`") for name in row[1].split(", ")] for row in rows}


def in_wandb(metric) -> list[str]:
    if metric in ONLY_IN_CSV:
        return ["–"]
    return [metric.name] if metric in AXES else [wandb_name(metric, split) for split in metric.rows.split(", ")]


def test_the_page_of_metrics_names_every_metric_and_no_other():
    names = [*(metric.name for metric in SYSTEM), *(f"gpu<g>_{metric.name}" for metric in OF_EACH_GPU)]
    of_nodes = {name: [wandb_name_of_node(name, "node-<n>")] for name in names}
    assert documented() == {metric.name: in_wandb(metric) for metric in METRICS} | of_nodes
    for metric in (*METRICS, *SYSTEM, *OF_EACH_GPU):
        assert f"| {metric.unit} | {metric.meaning} |" in PAGE.read_text()


def test_metrics_csv_has_the_documented_columns():
    assert set(COLUMNS) == {metric.name for metric in METRICS if metric not in ONLY_IN_WANDB}


@pytest.mark.parametrize("split", ["train", "val"])
def test_wandb_gets_the_documented_names(split):
    known = {metric.name for metric in METRICS if split in metric.rows}
    row = Row(**{f.name: 2 if f.name in known else None for f in fields(Row)} | {"split": split})
    expected = {
        name for metric in METRICS for name in in_wandb(metric) if name in (metric.name, f"{split}/{metric.name}")
    }
    assert values(row).keys() == expected - {"–"}
    assert all(re.fullmatch(r"(train/|val/)?[a-z0-9_]+", name) for name in expected)


class Kept:
    def __init__(self):
        self.rows = []

    def append(self, row):
        self.rows.append(row)


def tracking(reporter: Kept, circumstance: Circumstance, spent: Spent) -> Tracking:
    throughput = SimpleNamespace(interval=lambda device: spent, open_interval=lambda device: spent,
                                 validation=lambda: 1.5, elapsed=lambda: 9.0, load=lambda carried: None)  # fmt: skip
    return Tracking(throughput, every_steps=5, global_batch_size=32, images=160, circumstance=circumstance,
                    reporters=[reporter])  # fmt: skip


def test_a_row_tells_shares_of_its_span_and_what_the_devices_did(monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1100.0)
    kept, spent = Kept(), Spent(step=6.0, statistics=1.0, gradients=2.0, data=3.0, checkpoint=1.0)
    circumstance = Circumstance(ranks=4, nodes=2, began=1000.0, operations=(1e9, 2e9), peak=1e9)
    each = tracking(kept, circumstance, spent)
    each._useful = 44.0
    scores = Scores(0.5, 0.25, 0.75, 160)
    each._report(5, "train", scores, torch.device("cpu"), rate=0.1, **each._speed(10, 160, spent))
    (row,) = kept.rows
    assert (row.images_per_s, row.span, row.epoch, row.samples) == (16.0, 10.0, 1.0, 160)
    assert (row.data_wait, row.statistics_wait, row.gradient_wait, row.checkpoint_wait) == (0.3, 0.1, 0.2, 0.1)
    assert row.mfu == pytest.approx(16 * 2e9 / (4 * 1e9))
    assert each._speed(5, 160, spent)["mfu"] == pytest.approx(row.mfu / 2)  # of the first epoch, of smaller images
    assert each._speed(7, 160, spent)["mfu"] == pytest.approx(row.mfu * 0.7)  # three steps of one, two of the other
    assert row.goodput == 0.44
    assert (row.at, row.seconds, row.ranks, row.nodes) == (1100.0, 9.0, 4, 2)
    assert values(row)["train/images_per_s_node"] == 8.0
    assert values(row)["train/images_per_s_rank"] == 4.0


def test_what_no_peak_is_known_of_has_no_utilization():
    each = tracking(Kept(), Circumstance(operations=(2e9,)), Spent(step=1.0))
    assert each._speed(5, 10, Spent(step=1.0))["mfu"] is None
    assert peak_operations("cpu", "bf16") == peak_operations("NVIDIA A10G", "bf16") == 0
    assert peak_operations("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_operations("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_operations("NVIDIA A100-SXM4-80GB", "32") == 156e12
    assert peak_operations("NVIDIA A100-SXM4-80GB", "64") == 0


def test_operations_are_two_a_multiply_add_three_times_over():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.last = (
                nn.Conv2d(3, 8, 3, padding=1, bias=False),
                nn.BatchNorm2d(8),
                nn.Linear(8, 5),
            )

        def forward(self, x):
            return self.last(self.norm(self.conv(x)).mean((2, 3)))

    conv, last = 2 * 8 * 3 * 9 * 10 * 10, 2 * 8 * 5
    model = Small()
    assert operations_per_image(model, 10) == 2 * conv + 3 * last  # of the images no gradient is asked
    assert next(model.parameters()).device.type == "cpu"
    network = revert(build("bn_inception", num_classes=1000, norm=SyncBatchNorm))
    assert operations_per_image(network, 224) / 1e9 == pytest.approx(3 * 2 * 2.0, rel=0.04)


def test_a_run_keeps_its_rows_norms_and_machines_through_an_interruption(shards, tmp_path):
    settings = config(shards, tmp_path, "run", 1, "tracking.norms_every_steps=2", "tracking.every_steps=3")
    assert run_ranks(1, train_rank, settings, 7) == [True]  # between two rows
    again = config(shards, tmp_path, "run", 1, "tracking.norms_every_steps=2", "tracking.every_steps=3")
    assert run_ranks(1, train_rank, again, 0) == [False]
    rows = [row for row in read_journal(tmp_path / "run" / "metrics.csv") if row.split == "train"]
    assert [row.step for row in rows] == [3, 6, 9, 12, 15]
    assert all(row.data_wait + row.checkpoint_wait < 1 and 0 < row.goodput < 1 and row.mfu is None for row in rows)
    assert rows[2].span > rows[2].seconds  # of step 7, too, which the start before trained
    lines = [line.split(",") for line in (tmp_path / "run" / "norms.csv").read_text().splitlines()]
    assert lines[0] == ["step", "layer", "spread", "dead", "mean_drift", "variance_drift"]
    assert [int(step) for step in dict.fromkeys(line[0] for line in lines[1:])] == [2, 4, 6, 8, 10, 12, 14]
    assert len(lines) == 1 + 7 * 69
    starts = read_record(tmp_path / "run").starts
    assert [[each["ranks"] for each in start["machines"]] for start in starts] == [[1], [1]]
    assert all("undone" not in json.loads(json.dumps(start)) for start in starts)
