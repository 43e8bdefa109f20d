"""Jobs of a real cluster of two nodes: a run that Slurm stops in any of its ways goes on by itself, as the same run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline import cli
from pipeline.data.shards import read_manifest
from pipeline.launch.plan import read_record
from tests.callbacks.wandb_server import WandbServer
from tests.multiprocess.test_resume import final, journal

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
slow = pytest.mark.slow  # not by .ci/run

EPOCHS, STEPS = 6, 30
WORDS = (
    "recipe=bn_x5", "data=folder", "data.image_size=16", "model.stem=small", "model.width=0.125",
    "data.global_batch_size=24", f"trainer.max_epochs={EPOCHS}", "trainer.threads=1", "tracking.every_steps=1",
    "tracking.mode=disabled", "norm.precise_images=48", "ledger=true", "trainer.checkpoint_every_steps=4",
    "trainer.keep_checkpoints=99", "trainer.validate_every_epochs=3", "cluster=slurm_1x8", "cluster.nodes=2",
    "cluster.devices=2", "cluster.accelerator=cpu", "slurm.cpus_per_task=1", "slurm.minutes=30",
)  # fmt: skip
UNCHECKED = "slurm.check=false"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")


def launch(shards: Path, directory: Path, name: str, *more: str) -> Path:
    """The run's directory. It has one job."""
    assert cli.main(["launch", *WORDS, f"data.root={shards}", f'run.dir="{directory}"', f"run.id={name}", *more]) == 0
    return directory / name


def said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def until(holds: Callable[[], bool], run: Path, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, log(run)
        time.sleep(0.05)


def jobs(run: Path) -> list[str]:
    return (run / "jobs").read_text().split()


def log(run: Path) -> str:
    return "".join(path.read_text() for path in sorted(run.glob("logs/job-*.log")))


def state(job: str) -> str:
    return re.search(r"JobState=(\S+)", said("scontrol", "show", "job", "-o", job))[1]


def over(run: Path) -> str:
    """How the newest of its jobs ended."""
    until(lambda: state(jobs(run)[-1]) in OVER, run)
    return state(jobs(run)[-1])


def in_the_middle(run: Path, step: int = 6) -> str:
    """The job, once the run has taken so many steps."""
    until(lambda: len(rows(run)) > step, run)
    return jobs(run)[-1]


def rows(run: Path) -> list[str]:
    journal = run / "metrics.csv"
    return journal.read_text().splitlines() if journal.exists() else []


def same(run: Path, whole: Path) -> None:
    assert journal(run) == journal(whole)
    left, right = final(run), final(whole)
    assert left["global_step"] == right["global_step"] == STEPS
    assert all(torch.equal(value, right["state_dict"][name]) for name, value in left["state_dict"].items())
    for rank in range(4):
        ledgers = [(each / "ledger" / f"rank-{rank}.jsonl").read_text() for each in (run, whole)]
        assert ledgers[0] == ledgers[1]


def one_run(server: WandbServer, run: Path) -> None:
    """W&B has it as one run, whole and each row once, done."""
    assert list(server.runs) == [read_record(run).wandb_id]
    assert server.steps() == [row[:2] for row in journal(run)]
    assert server.run.exit_code == 0


@pytest.fixture(scope="session")
def whole(slurm: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two nodes with two processes each that nobody disturbed."""
    run = launch(shards, tmp_path_factory.mktemp("whole"), "whole")
    assert over(run) == "COMPLETED", log(run)
    return run


def test_a_run_of_two_nodes_sees_each_sample_once_an_epoch_and_logs_to_one_place(whole: Path, shards: Path) -> None:
    assert [row[0] for row in journal(whole) if row[1] == "train"] == list(range(1, STEPS + 1))
    lines = [json.loads(line) for rank in range(4) for line in
             (whole / "ledger" / f"rank-{rank}.jsonl").read_text().splitlines()]  # fmt: skip
    images = read_manifest(shards).count("train")
    for epoch in range(EPOCHS):
        seen = Counter(key for line in lines if line["epoch"] == epoch for key in line["keys"])
        assert set(seen.values()) == {1}
        assert len(seen) == images // 24 * 24
    assert (read_record(whole).starts[-1]["world"], read_record(whole).starts[-1]["ended"]) == (4, "done")
    assert [path.name for path in whole.glob("logs/job-*")] == [f"job-{jobs(whole)[0]}.log"]
    assert "4 processes" in log(whole)
    assert "the run is done" in log(whole)


def test_a_run_that_is_requeued_goes_on_as_the_same_run(whole: Path, shards, tmp_path, wandb_server) -> None:
    run = launch(shards, tmp_path, "run", "tracking.mode=online")
    said("scontrol", "requeue", in_the_middle(run))
    assert over(run) == "COMPLETED", log(run)
    same(run, whole)
    one_run(wandb_server, run)
    assert len(read_record(run).starts) == 2
    assert len(jobs(run)) == 1


@slow
def test_a_run_that_is_preempted_goes_on_as_the_same_run(whole: Path, shards, tmp_path, wandb_server) -> None:
    run = launch(shards, tmp_path, "run", "tracking.mode=online")
    in_the_middle(run)
    said("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    assert over(run) == "COMPLETED", log(run)
    same(run, whole)
    one_run(wandb_server, run)
    assert len(read_record(run).starts) == 2


def rank_process(run: Path, rank: int) -> int:
    train, place = ["-m", "pipeline", "train", f"{run}/config.yaml", ""], f"SLURM_PROCID={rank}"
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words, variables = ((process / name).read_bytes().decode().split("\0") for name in ("cmdline", "environ"))
            if words[1:] == train and place in variables:
                return int(process.name)
    raise AssertionError(f"rank {rank} does not run")


def signalled(process: int, number: int) -> bool:
    """Whether a signal has reached a process that was stopped. Slurm lets it go on with that; if not, it is pending."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True
    waits = int(re.search(r"ShdPnd:\s*(\w+)", status)[1], 16) & 1 << (number - 1)
    return bool(waits) or "\nState:\tT" not in status


@slow
@pytest.mark.parametrize("resubmit", ["requeue", "chain"])
def test_a_run_whose_time_is_up_saves_and_goes_on_by_itself(whole, shards, tmp_path, wandb_server, resubmit) -> None:
    """A rank stands still until Slurm has sent its USR2, a minute or two before the limit."""
    run = launch(shards, tmp_path, "run", f"slurm.resubmit={resubmit}", "tracking.mode=online", "slurm.lead_minutes=1",
                 "cluster.lead_seconds=60", "cluster.hang_seconds=0")  # fmt: skip
    job = in_the_middle(run)
    process = rank_process(run, 3)
    os.kill(process, signal.SIGSTOP)
    try:
        ran = re.search(r"RunTime=\d+:(\d+):", said("scontrol", "show", "job", "-o", job))[1]
        said("scontrol", "update", f"jobid={job}", f"timelimit={int(ran) + 2}")
        until(lambda: signalled(process, signal.SIGUSR2), run)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGCONT)
    said("scontrol", "update", f"jobid={job}", "timelimit=30")  # for its next start
    went_on_by_itself(run, whole, 2 if resubmit == "chain" else 1)
    one_run(wandb_server, run)


@slow
def test_a_run_of_torchruns_agents_is_signalled_and_goes_on_by_itself(whole, shards, tmp_path) -> None:
    run = launch(shards, tmp_path, "run", "slurm.launcher=torchrun")
    said("scancel", "--signal=USR2", in_the_middle(run))
    went_on_by_itself(run, whole, 1)


def went_on_by_itself(run: Path, whole: Path, count: int) -> None:
    """As the same run, in so many jobs, from a checkpoint of the moment at which the signal came."""
    until(lambda: "goes on as job" in log(run) or "starts itself again, 1 of at most 100" in log(run), run)
    assert "interrupted, and can go on; it starts itself again" in log(run)
    stopped = read_record(run).starts[0]
    assert over(run) == "COMPLETED", log(run)
    same(run, whole)
    assert len(jobs(run)) == count
    assert stopped["ended"] == "interrupted"
    assert read_record(run).starts[1]["step"] > 5
    assert len(read_record(run).starts) == 2


@slow
def test_a_run_whose_rank_crashes_ends(slurm, shards: Path, tmp_path: Path) -> None:
    run = launch(shards, tmp_path, "run")
    in_the_middle(run)
    os.kill(rank_process(run, 3), signal.SIGSEGV)
    assert over(run) == "FAILED", log(run)
    assert "ended with code 139: another start would end there again, there is none" in log(run)


@slow
def test_a_run_that_loses_a_rank_goes_on_as_the_same_run(whole: Path, shards: Path, tmp_path: Path) -> None:
    run = launch(shards, tmp_path, "run")
    in_the_middle(run)
    os.kill(rank_process(run, 3), signal.SIGKILL)
    assert over(run) == "COMPLETED", log(run)
    assert "it starts itself again, 1 of at most 100 times" in log(run)
    same(run, whole)
    assert len(read_record(run).starts) == 2


@slow
def test_a_run_that_loses_a_node_goes_on_as_the_same_run(whole: Path, shards, tmp_path, wandb_server) -> None:
    run = launch(shards, tmp_path, "run", "tracking.mode=online")
    job = in_the_middle(run)
    said("scontrol", "update", "nodename=pltest2", "state=down", "reason=test")
    try:
        until(lambda: state(job) == "PENDING", run)
    finally:
        # It is back by itself if its slurmd has answered meanwhile, and Slurm refuses this then.
        subprocess.run(["scontrol", "update", "nodename=pltest2", "state=resume"], check=False, timeout=60)
    assert over(run) == "COMPLETED", log(run)
    same(run, whole)
    one_run(wandb_server, run)
    assert len(read_record(run).starts) == 2


@slow
def test_a_run_goes_on_with_other_nodes(whole: Path, shards: Path, tmp_path: Path) -> None:
    run = launch(shards, tmp_path, "run", "slurm.restarts=0")
    said("scancel", "--signal=USR2", in_the_middle(run))
    assert over(run) == "FAILED"
    assert "slurm.restarts = 0 allows no more" in log(run)
    launch(shards, tmp_path, "run", "cluster.nodes=1", "cluster.devices=3")
    assert over(run) == "COMPLETED", log(run)
    assert [start["world"] for start in read_record(run).starts] == [4, 3]
    assert [row[:2] for row in journal(run)] == [row[:2] for row in journal(whole)]


@slow
def test_a_run_staged_on_the_disk_of_each_node_is_the_same_run(whole: Path, shards: Path, tmp_path: Path) -> None:
    """Whose name the nodes alone know: here they share a file system, so it is of each node's own name."""
    run = launch(shards, tmp_path, "run", "data.stage=true", f"data.cache={tmp_path}/$SLURMD_NODENAME/pipeline")
    assert over(run) == "COMPLETED", log(run)
    same(run, whole)
    disks = [[path.name[34:] for path in disk.iterdir()] for disk in tmp_path.glob("*/pipeline/shards")]
    assert len(disks) == 2
    for names in disks:  # all to train on, and of the others what the node's ranks validate on; nothing else
        assert {entry.shard for entry in read_manifest(shards).splits["train"]} <= set(names)
        assert len(names) == len(set(names)) <= 7
    assert {*disks[0], *disks[1]} == {path.name for path in shards.glob("*.tar")}
    assert "staging " in log(run)
    assert "WARNING: not staged" not in log(run)


APPTAINER = """#!/bin/bash
# It mounts what is there, or fails; then runs what follows the image.
while [[ $1 != image.sif ]]; do
  [[ $1 != --bind || -e ${2%%:*} ]] || { echo "mount source ${2%%:*} doesn't exist" >&2; exit 255; }
  shift
done
shift
exec "$@"
"""


@slow
def test_a_container_sees_the_disk_that_shards_are_staged_to(slurm, shards, tmp_path) -> None:
    tool = tmp_path / "bin" / "apptainer"
    tool.parent.mkdir()
    tool.write_text(APPTAINER)
    tool.chmod(0o755)
    run = launch(
        shards, tmp_path, "run", "trainer.max_epochs=1", "slurm.container=apptainer", "slurm.image=image.sif",
        f"slurm.python={sys.executable}", f"slurm.setup=['PATH={tool.parent}:$PATH']", "data.stage=true",
        f"data.cache={tmp_path}/disk of a node",
    )  # fmt: skip
    assert over(run) == "COMPLETED", log(run)
    assert len(list((tmp_path / "disk of a node" / "shards").glob("*.tar"))) == 7


@slow
def test_a_cancelled_run_saves_and_stays_ended(whole: Path, shards: Path, tmp_path: Path, capsys) -> None:
    run = launch(shards, tmp_path, "run")
    job = in_the_middle(run)
    assert cli.main(["launch", "--status", str(run)]) == 0
    assert f"job {job}: RUNNING" in capsys.readouterr().out
    assert cli.main(["launch", "--cancel", str(run)]) == 0
    assert over(run) == "CANCELLED"
    assert cli.main(["launch", "--status", str(run)]) == 0
    assert f"job {job}: not in the queue" in capsys.readouterr().out
    until(lambda: read_record(run).starts[-1].get("ended") == "interrupted", run, 30)
    launch(shards, tmp_path, "run")
    assert over(run) == "COMPLETED", log(run)
    same(run, whole)


def wrapper(directory: Path, body: str) -> str:
    """An interpreter of its own. Where it fakes the training, nodes are not checked: slurm.check=false."""
    path = directory / "python"
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return f"slurm.python={path}"


@pytest.mark.parametrize("resubmit", ["requeue", "chain"])
def test_a_job_that_dies_each_time_stops_at_its_cap_and_says_why(slurm, shards, tmp_path, resubmit) -> None:
    run = launch(shards, tmp_path, "run", wrapper(tmp_path, "kill -9 $$"), UNCHECKED, "slurm.restarts=2",
                 f"slurm.resubmit={resubmit}")  # fmt: skip
    until(lambda: "allows no more" in log(run), run)
    assert over(run) == "FAILED"
    assert log(run).count("a rank was killed by signal 9; it starts itself again") == 2
    assert "it has started itself again 2 times, and slurm.restarts = 2 allows no more" in log(run)


@slow
def test_a_run_that_never_gets_further_is_refused_by_the_start_that_sees_it(slurm, shards, tmp_path) -> None:
    run = tmp_path / "run"
    body = f"""[[ $SLURM_PROCID == 0 ]] && exec {sys.executable} "$@"
until (($(grep -c '"at"' '{run}/run.json') > ${{SLURM_RESTART_COUNT:-0}})); do sleep 0.2; done
kill -9 $$"""
    launch(shards, tmp_path, "run", wrapper(tmp_path, body), UNCHECKED, "run.stalled_starts=2")
    assert over(run) == "FAILED"
    assert "run failed 2 times in a row after step 0 and never got further" in log(run)
    assert "ended with code 2: another start would end there again, there is none" in log(run)
    assert len(read_record(run).starts) == 2


def test_another_shape_than_was_asked_for_stops_before_the_first_step(slurm, shards, tmp_path) -> None:
    run = launch(shards, tmp_path, "run", 'slurm.options=["--ntasks-per-node=1"]')
    assert over(run) == "FAILED"
    assert "Slurm gives 2 tasks on 2 nodes, but this run asked for 4 on 2; submit the script as it is" in log(run)
    assert read_record(run).starts == []


@slow
def test_ranks_compare_what_srun_started_with_the_config(slurm, shards, tmp_path) -> None:
    run = launch(shards, tmp_path, "run", wrapper(tmp_path, "exit 0"), UNCHECKED)
    assert over(run) == "COMPLETED"
    task = ["srun", "--nodes=2", "--ntasks=4", "--distribution=arbitrary",
            "--nodelist=pltest1,pltest1,pltest1,pltest2", "--export=ALL,PIPELINE_SLURM=srun",
            sys.executable, "-m", "pipeline", "train", str(run / "config.yaml")]  # fmt: skip
    done = subprocess.run(task, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (2, 137)
    assert "cluster.devices = 2 processes a node, but the launcher started 3 on node 0; make them equal" in done.stderr


@slow
def test_six_runs_of_an_array_end_two_at_a_time_though_one_is_preempted(slurm, shards, tmp_path) -> None:
    whole_node = ("cluster.nodes=1", "cluster.devices=2", "slurm.cpus_per_task=2", "trainer.max_epochs=3")
    first = launch(shards, tmp_path, "six", *whole_node, "--array", "0-5%2").with_name("six-0")
    runs = [first.with_name(f"six-{number}") for number in range(6)]
    node = re.search(r" NodeList=(\S+)", said("scontrol", "show", "job", "-o", in_the_middle(first)))[1]
    said("sbatch", "--partition=high", f"--nodelist={node}", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    most = 0

    def ended() -> bool:
        nonlocal most
        most = max(most, said("squeue", "--noheader", "--array", "--partition=low", "--states=RUNNING").count("\n"))
        return all(state(jobs(run)[-1]) in OVER for run in runs)

    until(ended, first, 600)
    assert [state(jobs(run)[-1]) for run in runs] == ["COMPLETED"] * 6, log(first)
    assert most == 2
    assert [len(read_record(run).starts) for run in runs] == [2, 1, 1, 1, 1, 1]
    alone = launch(shards, tmp_path, "alone", *whole_node, "--array", "0").with_name("alone-0")
    assert over(alone) == "COMPLETED", log(alone)
    assert journal(first) == journal(alone)
    weights = [final(run)["state_dict"] for run in (first, alone)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@slow
def test_an_array_is_a_job_for_each_of_its_runs(slurm, shards, tmp_path) -> None:
    once = f"mkdir {tmp_path}/killed 2>/dev/null && kill -9 $$; echo seed"
    first = launch(shards, tmp_path, "a", wrapper(tmp_path, once), UNCHECKED, "--array", "2-4", "cluster.nodes=1",
                   "cluster.devices=1").with_name("a-2")  # fmt: skip
    runs = [first, *(first.with_name(f"a-{number}") for number in (3, 4))]
    assert [over(run) for run in runs] == ["COMPLETED"] * 3
    assert [log(run).count("seed\n") for run in runs] == [1, 1, 1]
    assert sum(log(run).count("starts itself again") for run in runs) == 1  # that one alone, in its own log


def test_slurm_and_bash_read_every_name_as_it_is(slurm, shards, tmp_path) -> None:
    name = "it's #1 $(touch hacked) 100%j"
    noted = f"printf '%s\\n' \"$@\" >>{tmp_path}/words-$SLURM_PROCID"
    run = launch(
        shards, tmp_path / "a b; c", "unused", wrapper(tmp_path, noted), UNCHECKED, f'run.id="{name}"'
    ).with_name(name)
    assert over(run) == "COMPLETED"
    assert (run / "logs" / f"job-{jobs(run)[0]}.log").read_text().endswith("the run is done\n")
    assert (tmp_path / "words-0").read_text().splitlines()[:4] == ["-m", "pipeline", "train", f"{run}/config.yaml"]
    assert list(tmp_path.rglob("hacked")) == []


@slow
def test_runs_that_are_named_after_their_values_are_trained_as_one_array(slurm: Path, shards, tmp_path) -> None:
    words = [*WORDS, f"data.root={shards}", f'run.dir="{tmp_path}"', "run.id=m", "trainer.max_steps=6",
             "trainer.validate_every_epochs=0", "optimizer.rate=0.01,0.02", UNCHECKED]  # fmt: skip
    assert cli.main(["launch", "--multirun", *words]) == 0
    runs = [tmp_path / f"m-rate_{rate}" for rate in ("0.01", "0.02")]
    (job,) = {name.partition("_")[0] for run in runs for name in jobs(run)}
    for number, run in enumerate(runs):
        assert jobs(run) == [f"{job}_{number}"]
        assert over(run) == "COMPLETED", log(run)
        assert "the run is done" in log(run)
        (start,) = read_record(run).starts
        assert (start["ended"], start["world"]) == ("done", 4)
        assert [row[0] for row in journal(run) if row[1] == "train"] == list(range(1, 7))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".arrays", "m-rate_0.01", "m-rate_0.02"]
