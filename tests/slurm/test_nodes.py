"""Nodes of a real cluster, looked at before the first step: what is wrong with one ends the job with one clear line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.launch.plan import read_record
from tests.slurm.test_jobs import WORDS, jobs, launch, log, over, slow, wrapper

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SHORT = ("trainer.max_epochs=1", "trainer.validate_every_epochs=0", "norm.precise_images=0")


def stopped(run: Path, code: int, said: str) -> None:
    """The job ended before a first step, once, and why stands in its log in one line."""
    assert over(run) == "FAILED", log(run)
    (line,) = [line for line in log(run).splitlines() if line.startswith("fault ")]
    assert said in line
    assert " -> " in line
    assert "not all nodes are fit for this run: see above" in log(run)
    assert f"ended with code {code}: another start would end there again, there is none" in log(run)
    assert read_record(run).starts == []
    assert len(jobs(run)) == 1
    assert not (run / "metrics.csv").exists()
    assert "Traceback" not in log(run)
    report = json.loads((run / "logs" / f"nodes-{jobs(run)[0]}.json").read_text())
    assert (report["verdict"], report["exit_code"], len(report["ranks"])) == ("no-go", code, 4)


def on_the_second_node(directory: Path, line: str) -> str:
    """An interpreter before which a line of bash runs on one node of the two."""
    return wrapper(directory, f'[[ $SLURMD_NODENAME != pltest2 ]] || {{ {line}; }}\nexec {sys.executable} "$@"')


@pytest.mark.parametrize("how", ["slurm.launcher=srun", pytest.param("slurm.launcher=torchrun", marks=slow)])
def test_healthy_nodes_are_shown_and_the_run_begins(slurm, shards: Path, tmp_path: Path, how: str) -> None:
    run = launch(shards, tmp_path, "run", *SHORT, how)
    assert over(run) == "COMPLETED", log(run)
    lines = log(run).splitlines()
    table = [line.split()[:2] for line in lines if line[:1].isdigit()]
    assert table == [["0", "pltest1"], ["1", "pltest1"], ["2", "pltest2"], ["3", "pltest2"]]
    go = next(number for number, line in enumerate(lines) if line.startswith("GO: "))
    done = next(number for number, line in enumerate(lines) if line.endswith("the run is done"))
    assert go < done
    report = json.loads((run / "logs" / f"nodes-{jobs(run)[0]}.json").read_text())
    assert {fact["interface"] for fact in report["ranks"]} == {"eth0"}
    assert report["network"]["backend"] == "gloo"
    assert report["network"]["gradients"]["bytes"] == 25_000_000
    assert len(read_record(run).starts) == 1


def test_a_clock_that_is_off_ends_the_job(slurm, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "off").mkdir()
    (tmp_path / "off" / "sitecustomize.py").write_text(
        "import time\nreal = time.time\ntime.time = lambda: real() + 100\n"
    )
    late = on_the_second_node(tmp_path, f"export PYTHONPATH={tmp_path}/off:$PYTHONPATH")
    run = launch(shards, tmp_path, "run", *SHORT, late)
    stopped(run, 2, "pltest2: 100.0 s ahead of rank 0 on pltest1")


def test_another_number_of_gpus_than_was_asked_for_ends_the_job(slurm, shards: Path, tmp_path: Path) -> None:
    fewer = on_the_second_node(tmp_path, "export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%,*}")
    run = launch(shards, tmp_path, "run", *SHORT, fewer, "slurm.gpus_per_node=2")
    stopped(run, 2, "pltest2: 1 GPU in CUDA_VISIBLE_DEVICES, the job asked for 2 a node")


def test_a_node_without_the_shards_ends_the_job(slurm, shards: Path, tmp_path: Path) -> None:
    body = f'exec unshare --mount sh -c \'mount -t tmpfs none {shards} && exec "$0" "$@"\' {sys.executable} "$@"'
    run = launch(shards, tmp_path, "run", *SHORT, on_the_second_node(tmp_path, body))
    stopped(run, 3, "pltest2: ")
    assert "dataset.json" in log(run)


def test_nodes_are_looked_at_alone_in_a_job_that_leaves_nothing(slurm, shards: Path, tmp_path: Path, capfd) -> None:
    words = ["doctor", "--nodes", *WORDS, f"data.root={shards}", f"run.dir={tmp_path}", "run.id=run"]
    assert cli.main([*words, "--json"]) == 0
    output = capfd.readouterr()
    report = json.loads(output.out)
    assert (report["verdict"], [fact["host"] for fact in report["ranks"]]) == ("go", ["pltest1"] * 2 + ["pltest2"] * 2)
    assert "GO: " in output.err
    assert list(tmp_path.iterdir()) == []


@slow
def test_ranks_that_do_not_come_are_named_and_end_the_job(slurm, shards: Path, tmp_path: Path) -> None:
    run = launch(shards, tmp_path, "run", *SHORT, on_the_second_node(tmp_path, "exit 1"))
    assert over(run) == "FAILED", log(run)
    assert "ranks 2, 3 on pltest2 did not come within 120 s" in log(run)
    assert "ended with code 2: another start would end there again, there is none" in log(run)
    assert read_record(run).starts == []
    assert len(jobs(run)) == 1
