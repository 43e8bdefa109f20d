"""A W&B sweep as an array of a real cluster: an element that is preempted goes on as the same run of the sweep."""

from __future__ import annotations

import pytest

from pipeline.config import read_config
from pipeline.launch.plan import read_record
from tests.multiprocess.test_resume import journal
from tests.slurm.test_jobs import STEPS, in_the_middle, launch, log, over, said, until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

RATES = (0.01, 0.02, 1e-05)
# A node holds one element, so that what preempts one leaves the others alone.
ONE_NODE = ("cluster.nodes=1", "cluster.devices=2", "slurm.cpus_per_task=2", "tracking.mode=auto", "ledger=false")


def test_an_element_that_is_preempted_keeps_its_parameters_and_its_run(wandb_server, shards, tmp_path) -> None:
    given = wandb_server.sweep(*({"optimizer.rate": rate} for rate in RATES)).given
    sweep = ("--sweep", "someone/pipeline/swept", "--array", "0-2%2")
    first = launch(shards, tmp_path, "a", *ONE_NODE, *sweep).with_name("a-0")
    runs = [first, first.with_name("a-1"), first.with_name("a-2")]
    job = in_the_middle(runs[0])
    drawn, name = (runs[0] / "config.yaml").read_bytes(), read_record(runs[0]).wandb_id
    node = said("squeue", "--noheader", f"--jobs={job}", "--format=%N").strip()
    said("sbatch", "--partition=high", f"--nodelist={node}", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    until(lambda: len(read_record(runs[0]).starts) == 2, runs[0])
    assert [over(run) for run in runs] == ["COMPLETED"] * 3, "".join(map(log, runs))

    assert ((runs[0] / "config.yaml").read_bytes(), read_record(runs[0]).wandb_id) == (drawn, name)
    assert [len(read_record(run).starts) for run in runs] == [2, 1, 1]
    assert [parameters["optimizer.rate"] for parameters in given.values()] == list(RATES)
    assert wandb_server.calls["CreateAgent"] == 3  # a start that goes on does not ask
    assert set(wandb_server.runs) == {read_record(run).wandb_id for run in runs} == set(given)
    for run in runs:
        stored = wandb_server.runs[read_record(run).wandb_id]
        assert read_config(run / "config.yaml").optimizer.rate == given[stored.name]["optimizer.rate"]
        assert (stored.sweep, stored.exit_code, stored.preempting) == ("swept", 0, False)
        steps = [row["step"] for row in stored.history if "train/loss" in row]
        assert steps == list(range(1, STEPS + 1))
        assert [int(row[0]) for row in journal(run) if row[1] == "train"] == steps
