"""The job script: what it says, that nothing a user gives gets out of its quotes, and how it goes on or ends."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.cli import preflight
from pipeline.cli.runs import of_run
from pipeline.config import ConfigError, compose_config, read_config
from pipeline.doctor.nodes import ARRIVAL_SECONDS, LINK_SECONDS
from pipeline.launch import queue
from pipeline.launch.failure import CODE, leave_code
from pipeline.launch.plan import read_record
from pipeline.launch.slurm import TEMPLATES, Job, array_numbers, render, render_check
from pipeline.launch.targets import slurm_job
from pipeline.world import World

GOLDEN = Path(__file__).parents[1] / "golden" / "slurm"
BARE = Job(
    name="first", run=Path("/runs/first"), script=Path("/runs/first/job.sbatch"), directory=Path("/home/me/lab"),
    nodes=4, devices=8, threads=12, python="/venv/bin/python", partition="gpu", account="vision", minutes=1440,
    lead_minutes=5, cpus_per_task=12, gpus_per_node=8, restarts=100, check=True,
)  # fmt: skip
INSIDE = {"python": "python3", "mounts": ("/data:/data:ro", "/scratch"), "made": (Path("/local/me"),),
          "places": (Path("/home/me/lab"), Path("/local/me"))}  # fmt: skip
JOBS = {
    "bare": BARE,
    "torchrun": dataclasses.replace(BARE, launcher="torchrun"),
    "chain": dataclasses.replace(BARE, resubmit="chain", interface="ib0", infiniband="mlx5_0,mlx5_3:1"),
    "array": dataclasses.replace(BARE, array="0-5%2", script=Path("/runs/first-0/job.sbatch"), resubmit="chain"),
    "sweep": dataclasses.replace(
        BARE, array="0-7%2", draws=True, script=Path("/runs/first-0/job.sbatch"), container="apptainer",
        image="/images/p.sif", **INSIDE,
    ),
    "apptainer": dataclasses.replace(BARE, container="apptainer", image="/images/p.sif", **INSIDE),
    "pyxis": dataclasses.replace(BARE, container="pyxis", image="/images/p.sqsh", **INSIDE),
    "site": dataclasses.replace(
        BARE, modules=("cuda/12.9", "gcc"), setup=("export NCCL_DEBUG=WARN",), gpus_per_node=0, qos="long",
        constraint="a100|h100", exclude="node[3,7]", memory="480G", options=("--gres=gpu:8", "--reservation=my week"),
        infiniband="off",
    ),
}  # fmt: skip
EVIL = """it's "$(touch hacked)" `touch hacked` ; touch hacked # @{run} %j & *"""


@pytest.mark.parametrize("name", [*JOBS, "nodes"])
def test_the_script_is_the_golden_one(name):
    """Written anew by PIPELINE_WRITE_GOLDEN=1, to be read before it is committed."""
    path = GOLDEN / f"{name}.sbatch"
    text = render_check(BARE, timeout=30) if name == "nodes" else render(JOBS[name])
    if os.environ.get("PIPELINE_WRITE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def test_scripts_pass_shellcheck():
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    scripts = [*GOLDEN.glob("*.sbatch"), TEMPLATES / "nccl_check.sbatch"]
    assert len(scripts) == len(JOBS) + 2
    done = subprocess.run([shellcheck, *map(str, scripts)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def program(directory: Path, name: str, body: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins of Slurm's commands, which write down what they were told: one call a line in calls, words in words."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name in ("srun", "scontrol", "sbatch", "squeue", "scancel", "sinfo"):
        program(bin_, name, f"""
[[ "$1 $2" != "show hostnames" ]] || {{ echo node1; echo node2; exit 0; }}
echo "{name} $*" >>'{tmp_path}/calls'
if [[ {name} == srun && "$*" == *" doctor --nodes "* ]]; then
  [[ -z ${{SIGNAL:-}} ]] || kill -s "$SIGNAL" "$(sed -n 's/^PPid:[[:space:]]*//p' /proc/$PPID/status)"
  exit "${{CHECK:-0}}"
fi
if [[ {name} == srun ]]; then
  printf '%s\\0' "$@" >'{tmp_path}/words'
  [[ -z ${{LEAVES:-}} ]] || echo "$LEAVES" >"$PIPELINE_CODE"
  exit "${{ENDS:-0}}"
fi
[[ {name} != sbatch ]] || echo "${{ANSWERS-41}}"
[[ {name} != sinfo ]] || echo "gpu* up 4"
[[ {name} != squeue ]] || printf '%b' "${{QUEUE:-}}"
[[ -z ${{FAILS:-}} || $1 != --test-only ]] || {{ echo "{name}: error: $FAILS" >&2; exit 1; }}""")  # fmt: skip
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_script(job: Job, **environment: str) -> tuple[int, str]:
    """The script as Slurm would start it on two nodes of two tasks; its code, and what it printed."""
    (job.run / "logs").mkdir(parents=True, exist_ok=True)
    given = {"SLURM_JOB_ID": "40", "SLURM_JOB_NUM_NODES": str(job.nodes), "SLURM_JOB_NODELIST": "node[1-2]",
             "SLURM_NTASKS": str(job.nodes * job.tasks_per_node), "SLURM_CPUS_PER_TASK": "12"}  # fmt: skip
    done = subprocess.run(["/bin/bash", "-c", render(job)], env={**os.environ, **given, **environment}, text=True,
                          capture_output=True, timeout=30, check=False)  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def small(directory: Path, **fields: object) -> Job:
    run = directory / "runs" / "a"
    return dataclasses.replace(BARE, run=run, script=run / "job.sbatch", nodes=2, devices=2, **fields)


def words(directory: Path) -> list[str]:
    return (directory / "words").read_text().split("\0")[:-1]


def test_nothing_that_a_user_gives_gets_out_of_its_quotes(slurm):
    run = slurm / "runs" / EVIL.replace("/", "")
    job = small(slurm, container="apptainer", image=EVIL, mounts=(f"/{EVIL}:/x",), interface=EVIL, partition=EVIL,
                python=EVIL, options=(f"--comment={EVIL}",))  # fmt: skip
    job = dataclasses.replace(job, run=run, script=run / "job.sbatch", name=EVIL, directory=Path("/") / EVIL)
    code, said = run_script(job)
    assert code == 0, said
    assert words(slurm) == [
        "--kill-on-bad-exit=1", "apptainer", "exec", "--nv", "--bind", f"/{EVIL}:/x", "--pwd", f"/{EVIL}", EVIL,
        EVIL, "-m", "pipeline", "train", f"{run}/config.yaml",
    ]  # fmt: skip
    assert list(slurm.rglob("hacked")) == []


def test_a_value_keeps_its_quotes_in_the_header():
    text = render(dataclasses.replace(BARE, options=('--comment=a "b" #c \\d',)))
    assert '#SBATCH "--comment=a \\"b\\" #c \\\\d"' in text
    assert "--output=/100%%/a/logs/job-%j.log" in render(dataclasses.replace(BARE, run=Path("/100%/a")))


def test_an_interrupted_job_starts_itself_again_up_to_its_cap_and_says_why_it_stops(slurm):
    job = small(slurm, restarts=2)
    for number in (1, 2):
        code, said = run_script(job, LEAVES="75", ENDS="0")
        assert code == 0
        assert f"interrupted, and can go on; it starts itself again, {number} of at most 2 times" in said
    code, said = run_script(job, LEAVES="75", ENDS="0")
    assert code == 75
    assert "it has started itself again 2 times, and slurm.restarts = 2 allows no more" in said
    assert (slurm / "calls").read_text().count("scontrol requeue 40") == 2


@pytest.mark.parametrize(
    ("leaves", "ends", "code"), [("", "0", 0), ("1", "137", 1), ("2", "2", 2), ("", "139", 139), ("75", "139", 139)]
)
def test_any_other_end_is_final(slurm, leaves, ends, code):
    assert run_script(small(slurm, restarts=9), LEAVES=leaves, ENDS=ends)[0] == code
    assert "requeue" not in (slurm / "calls").read_text()


@pytest.mark.parametrize("ends", ["75", "137", "143"])
def test_a_rank_that_was_killed_from_outside_is_no_end(slurm, ends):
    code, said = run_script(small(slurm, restarts=9), ENDS=ends)
    assert (code, "starts itself again, 1 of at most 9 times" in said) == (0, True)


def test_a_chain_goes_on_in_a_job_that_depends_on_this_one(slurm):
    job = small(slurm, restarts=3, resubmit="chain")
    code, said = run_script(job, LEAVES="75")
    assert code == 0, said
    assert "goes on as job 41" in said
    assert (job.run / "jobs").read_text() == "41\n"
    follow = "sbatch --parsable --dependency=afterany:40 --export=ALL,PIPELINE_ORIGIN=40"
    assert follow in (slurm / "calls").read_text()
    run_script(job, LEAVES="75", SLURM_JOB_ID="41", PIPELINE_ORIGIN="40")
    run_script(job, LEAVES="75", SLURM_JOB_ID="42", PIPELINE_ORIGIN="40")
    code, said = run_script(job, LEAVES="75", SLURM_JOB_ID="43", PIPELINE_ORIGIN="40")
    assert (code, "slurm.restarts = 3 allows no more" in said) == (75, True)


@pytest.mark.parametrize(("check", "code", "said"), [
    ("2", 2, "not all nodes are fit for this run: see above"), ("3", 3, "another start would end there again"),
    ("1", 1, "ended with code 1"), ("124", 124, "ended with code 124"),
])  # fmt: skip
def test_nodes_that_are_not_fit_end_the_job_before_it_trains(slurm, check, code, said):
    ended, output = run_script(small(slurm, restarts=9), CHECK=check)
    assert ended == code
    assert said in output
    assert "train" not in (slurm / "calls").read_text()
    assert "requeue" not in (slurm / "calls").read_text()


@pytest.mark.parametrize("check", ["75", "137", "143"])
def test_a_check_that_is_interrupted_is_no_end(slurm, check):
    code, said = run_script(small(slurm, restarts=9), CHECK=check)
    assert (code, "starts itself again, 1 of at most 9 times" in said) == (0, True)
    assert "train" not in (slurm / "calls").read_text()


@pytest.mark.parametrize("timeout", [0.0, 30.0, 600.0])
def test_srun_ends_no_rank_that_still_waits_for_one_which_failed_at_its_start(timeout):
    """Killed before, they would not say which it was, and the job would go on as after a kill from outside."""
    text = render_check(BARE, timeout)
    waits, ends = (int(re.search(pattern, text)[1]) for pattern in (r"--wait=(\d+)", r"--kill-after=20 (\d+)"))
    assert (timeout or ARRIVAL_SECONDS) + LINK_SECONDS + 60 <= waits < ends  # 60 until rank 0's Python has started


def test_nothing_is_started_any_more_once_slurm_ends_the_job(slurm):
    code, said = run_script(small(slurm, restarts=9), SIGNAL="TERM")
    assert (code, "interrupted, and can go on; Slurm ends this job" in said) == (75, True), said
    assert "train" not in (slurm / "calls").read_text()


def test_the_check_is_left_out_where_nobody_wants_it(slurm):
    assert run_script(small(slurm, check=False), CHECK="2")[0] == 0
    assert "doctor" not in (slurm / "calls").read_text()


def test_a_check_alone_leaves_its_code(slurm):
    job = small(slurm)
    (job.run / "logs").mkdir(parents=True)
    for code in ("0", "3"):
        environment = {**os.environ, "SLURM_JOB_ID": "40", "SLURM_JOB_NODELIST": "node[1-2]", "CHECK": code,
                       "SLURM_CPUS_PER_TASK": "12"}  # fmt: skip
        done = subprocess.run(["/bin/bash", "-c", render_check(job)], env=environment, check=False, timeout=30)
        assert str(done.returncode) == (job.run / "logs" / "code").read_text().strip() == code


def test_a_check_alone_makes_the_cache_of_its_container_on_every_node(slurm):
    job = small(slurm, container="apptainer", image="/images/p.sif", made=(Path("/local/me"),))
    (job.run / "logs").mkdir(parents=True)
    environment = {**os.environ, "SLURM_JOB_ID": "40", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]",
                   "SLURM_CPUS_PER_TASK": "12"}  # fmt: skip
    done = subprocess.run(["/bin/bash", "-c", render_check(job)], env=environment, capture_output=True, text=True,
                          check=False, timeout=30)  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = "srun --ntasks=2 --ntasks-per-node=1 --cpus-per-task=1 mkdir -p -- /local/me"
    assert made in (slurm / "calls").read_text()


def test_a_task_of_an_array_starts_itself_alone(slurm):
    job = dataclasses.replace(small(slurm, array="0-5", restarts=1), run=slurm / "runs" / "b")
    (slurm / "runs" / "b-4" / "logs").mkdir(parents=True)
    code, said = run_script(job, LEAVES="75", SLURM_ARRAY_JOB_ID="39", SLURM_ARRAY_TASK_ID="4")
    assert code == 0, said
    assert "scontrol requeue 39_4" in (slurm / "calls").read_text()
    assert words(slurm)[-1] == f"{slurm}/runs/b-4/config.yaml"


def test_another_shape_than_was_asked_for_starts_nothing(slurm):
    code, said = run_script(small(slurm), SLURM_NTASKS="2")
    assert code == 2
    assert "Slurm gives 2 tasks on 2 nodes, but this run asked for 4 on 2; submit the script as it is" in said
    assert not (slurm / "calls").exists()


def test_torchrun_is_told_its_node_and_deaf_to_the_signal_for_its_ranks(slurm):
    code, said = run_script(small(slurm, launcher="torchrun"))
    assert code == 0, said
    assert words(slurm)[1:5] == [
        "bash", "-c", 'trap "" USR2; exec "$0" -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"',
        "/venv/bin/python",
    ]  # fmt: skip
    assert "--master-addr=node1" in words(slurm)
    assert "--master-port=10040" in words(slurm)


def test_the_first_code_counts_and_an_interruption_is_no_bad_exit(tmp_path, monkeypatch):
    monkeypatch.delenv(CODE, raising=False)
    assert [leave_code(code) for code in (0, 1, 75)] == [0, 1, 75]
    monkeypatch.setenv(CODE, str(tmp_path / "code"))
    assert [leave_code(code) for code in (0, 75, 1)] == [0, 0, 1]
    assert (tmp_path / "code").read_text() == "75"


def test_srun_is_believed_only_where_our_script_says_so():
    step = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "2",
            "SLURM_STEP_TASKS_PER_NODE": "3,2,1"}  # fmt: skip
    assert World.from_environment(step) == World()
    assert not World.is_launched(step)
    ours = {**step, "PIPELINE_SLURM": "srun"}
    assert World.from_environment(ours) == World(rank=5, size=6, local_rank=0, local_size=1, node=2)
    assert World.is_launched(ours)
    even = {**ours, "SLURM_STEP_TASKS_PER_NODE": "2(x3)"}
    assert World.from_environment(even).local_size == 2
    torchrun = {**step, "PIPELINE_SLURM": "torchrun", "RANK": "1", "WORLD_SIZE": "2"}
    assert (World.from_environment(torchrun).rank, World.from_environment(torchrun).size) == (1, 2)
    assert World.from_environment(World(3, 4, 1, 2, 1).environment()) == World(3, 4, 1, 2, 1)


def test_numbers_of_an_array():
    assert array_numbers("0-5%2") == [0, 1, 2, 3, 4, 5]
    assert array_numbers("1,4,7-9") == [1, 4, 7, 8, 9]
    for text in ("", "a", "5-1", "1,1", "0-3%0", "0-3;x", "0-99999999"):
        with pytest.raises(ValueError, match="--array"):
            array_numbers(text)


def launch(shards: Path, *more: str) -> int:
    return cli.main(["launch", "recipe=bn_x5", "data=folder", f"data.root={shards}", "data.global_batch_size=24",
                     "cluster=slurm_1x8", "cluster.nodes=2", "run.id=a", *more])  # fmt: skip


def test_a_launch_freezes_the_run_submits_it_and_notes_its_job(slurm, shards, capsys):
    assert launch(shards) == 0
    run, said = slurm / "runs" / "a", capsys.readouterr().out
    assert (run / "job.sbatch").read_text() in said
    assert f"job 41: a, log {run}/logs/job-41.log" in said
    assert "pipeline launch --follow runs/a" in said
    assert (run / "jobs").read_text() == "41\n"
    assert f"sbatch --parsable {Path('runs/a/job.sbatch')}" in (slurm / "calls").read_text()
    assert read_record(run).starts == []  # noted where it begins
    frozen = read_config(run / "config.yaml")
    assert (frozen.world, frozen.trainer.threads, frozen.data.num_classes) == (16, 12, 5)
    assert not (run / ".lock").exists()


def test_a_run_that_is_in_the_queue_is_not_submitted_twice(slurm, shards, capsys, monkeypatch):
    assert launch(shards) == 0
    monkeypatch.setenv("QUEUE", "41|PENDING|0:00|(Priority)\n")
    assert launch(shards) == 2
    line = capsys.readouterr().err
    assert "run.id = a has job 41 in the queue (PENDING 0:00 (Priority))" in line
    assert "pipeline launch --cancel runs/a" in line
    assert cli.main(["launch", "--status", "runs/a"]) == 0
    assert "job 41: PENDING" in capsys.readouterr().out
    assert cli.main(["launch", "--cancel", "runs/a"]) == 0
    assert "scancel 41" in (slurm / "calls").read_text()
    monkeypatch.delenv("QUEUE")
    assert launch(shards, "cluster.nodes=4") == 0  # goes on, on other nodes
    assert read_config(slurm / "runs" / "a" / "config.yaml").world == 32


def test_of_two_launches_of_a_run_at_once_one_submits(slurm, shards, capsys, monkeypatch):
    examined = preflight.before_submission

    def meanwhile(*arguments, **named):
        (slurm / "runs" / "a").mkdir(parents=True)
        (slurm / "runs" / "a" / "jobs").write_text("40\n")  # of the other, which was faster
        (slurm / "runs" / "a" / "config.yaml").write_text("schema: 1\n")
        monkeypatch.setenv("QUEUE", "40|PENDING|0:00|(Priority)\n")
        return examined(*arguments, **named)

    monkeypatch.setattr(preflight, "before_submission", meanwhile)
    assert launch(shards) == 2
    assert "run.id = a has job 40 in the queue" in capsys.readouterr().err
    assert "sbatch --parsable" not in (slurm / "calls").read_text()


def test_a_dry_run_asks_doctor_and_slurm_and_leaves_nothing(slurm, shards, capsys, monkeypatch):
    monkeypatch.setenv("ANSWERS", "sbatch: Job 7 to start at 2027-01-02T03:04:05 using 16 processors on nodes n[1-2]")
    assert launch(shards, "--dry-run") == 0
    said = capsys.readouterr()
    assert said.out.startswith("#!/bin/bash\n#SBATCH --job-name=a\n")
    table = " ".join(said.err.split())
    assert "ok job Slurm would take it: it could start at 2027-01-02T03:04:05 using 16 processors on nodes" in table
    assert "GO: 1 warning (W&B)" in table
    calls = (slurm / "calls").read_text()
    assert calls.count("sbatch --test-only") == 1
    assert "sbatch --parsable" not in calls
    assert not (slurm / "runs").exists()


@pytest.mark.parametrize(("key", "code", "said"), [
    ("data.global_batch_size=500", 2, "exceeds the 130 training images"),
    ("data.num_classes=3", 3, "lies outside the 3 classes"),
])  # fmt: skip
def test_a_fault_keeps_a_run_from_the_queue(slurm, shards, capsys, key, code, said):
    assert launch(shards, key) == code
    shown = capsys.readouterr().err
    assert said in " ".join(shown.split())
    assert shown.endswith("not submitted; mend what is at fault, or submit it all the same with --force\n")
    assert launch(shards, key, "--dry-run") == code
    assert "sbatch --parsable" not in (slurm / "calls").read_text()
    assert not (slurm / "runs").exists()


def test_a_refusal_of_slurm_is_known_before_anything_is_written_and_force_asks_it_again(slurm, shards, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAILS", "invalid partition specified: nowhere")
        assert launch(shards, "slurm.partition=nowhere") == 2
        table = " ".join(capsys.readouterr().err.split())
        assert "fault job sbatch: error: invalid partition specified: nowhere -> change the keys of slurm.*" in table
        assert not (slurm / "runs").exists()
        assert launch(shards, "slurm.partition=nowhere", "--force") == 0
    assert "sbatch --parsable" in (slurm / "calls").read_text()
    assert (slurm / "runs" / "a" / "jobs").read_text() == "41\n"


def test_a_warning_is_a_line_and_no_obstacle(slurm, shards, capsys):
    assert launch(shards) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == ["warning  W&B: there is no key: tracking.mode = auto falls back to offline -> set WANDB_API_KEY, "
                    "or run `wandb login`, or choose tracking.mode=offline"]  # fmt: skip


def test_a_check_alone_whose_queue_is_lost_leaves_no_job(slurm, capsys, monkeypatch):
    def lost(job, *_):
        (path,) = slurm.glob(".doctor-*/nodes.sbatch")
        assert "--time=25" in path.read_text()  # as long as its ranks may take
        raise queue.QueueError(f"squeue has not answered for {job}; try again later")

    monkeypatch.setattr(queue, "follow", lost)
    words = ["doctor", "--nodes", "cluster=slurm_1x8", f"run.dir={slurm}", "--timeout=600"]
    assert cli.main(words) == 1
    assert "squeue has not answered for 41; try again later" in capsys.readouterr().err
    assert "scancel 41" in (slurm / "calls").read_text()
    assert list(slurm.glob(".doctor-*")) == []


def test_a_time_for_ranks_without_ranks_is_refused(capsys):
    assert cli.main(["doctor", "--timeout=5", "cluster=slurm_1x8"]) == 2
    assert "--timeout 5 is for ranks to come, which --nodes starts; add that" in capsys.readouterr().err


def test_digits_are_packed_by_a_submission_and_not_by_a_dry_run(slurm, capsys):
    words = ["launch", "recipe=smoke", "data=digits", "data.root=digits", "cluster=slurm_1x8", "cluster.devices=2"]
    assert cli.main([*words, "--dry-run"]) == 0
    assert not (slurm / "digits").exists()
    assert cli.main(words) == 0
    assert (slurm / "digits" / "dataset.json").exists()
    assert capsys.readouterr().out.count("packing") == 1


def test_doctor_asks_slurm_about_the_job_that_a_launch_would_submit(slurm, shards, capsys):
    words = ["doctor", "--json", "data=folder", f"data.root={shards}", "data.global_batch_size=24", "trainer.threads=1",
             "data.image_size=16", "model.stem=small", "cluster=slurm_1x8"]  # fmt: skip
    for fails, state in (("", "ok"), ("invalid account", "fault")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FAILS", fails)
            code = cli.main(words)
        found = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
        assert (found["job"]["state"], code) == (state, 2 if fails else 0)
    assert found["job"]["text"] == "sbatch: error: invalid account"
    assert "memory" not in found  # of this machine, where the run is not
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        assert cli.main(words) == 0
    (said,) = [f for f in json.loads(capsys.readouterr().out)["findings"] if f["section"] == "slurm"]
    assert (said["state"], said["way_out"]) == ("warning", "look, and launch, where Slurm's commands are")
    assert not (slurm / "runs").exists()


STAGED = ["data.stage=true", "data.cache=$SLURM_TMPDIR/pipeline"]


def test_a_variable_that_only_nodes_have_stays_in_the_config_and_out_of_the_script(slurm, shards, capsys, monkeypatch):
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    assert launch(shards, *STAGED, "slurm.container=pyxis", "slurm.image=/p.sqsh") == 0
    run = slurm / "runs" / "a"
    assert read_config(run / "config.yaml").data.cache == "$SLURM_TMPDIR/pipeline"
    assert "SLURM_TMPDIR" not in (run / "job.sbatch").read_text()
    words = ["train", str(run / "config.yaml"), "cluster.launcher=local", "cluster.nodes=1", "cluster.devices=1"]
    assert cli.main(words) == 2
    assert "data.cache = $SLURM_TMPDIR/pipeline: SLURM_TMPDIR is not set on this node; set" in capsys.readouterr().err


def test_a_cache_that_a_container_is_to_see_is_made_on_each_node_and_mounted(slurm, shards, capsys):
    inside = ["data.stage=true", "data.cache='/local/a b'", "slurm.container=apptainer", "slurm.image=/p.sif"]
    assert launch(shards, *inside, "--dry-run") == 0
    script = capsys.readouterr().out
    assert """mkdir -p -- '/local/a b'""" in script
    assert """--bind '/local/a b:/local/a b'""" in script
    assert launch(shards, *inside[:2], "--dry-run") == 0
    assert "/local" not in capsys.readouterr().out  # without a container whoever needs it makes it


def test_weights_that_are_gone_are_not_mounted_and_missed_only_without_a_checkpoint(slurm):
    words = ["data=digits", "cluster=slurm_1x8", "model.init=/weights/of/old/first.pth"]
    inside = ["slurm.container=apptainer", "slurm.image=/p.sif"]
    runs = [compose_config([*words, *inside, f"run.id={name}"]) for name in ("a-0", "a-1")]
    for run in runs:
        with pytest.raises(ConfigError, match=rf"first.pth is no file, and {run.directory} has no .*; bring the file"):
            slurm_job(runs, "0-1")
        (run.directory / "checkpoints").mkdir(parents=True)
        (run.directory / "checkpoints" / "step-00000002.ckpt").touch()
    assert "/weights" not in render(slurm_job(runs, "0-1"))
    slurm_job([compose_config([*words, "run.id=b"])])  # without a container there is nothing to mount
    there = slurm / "weights" / "first.pth"
    there.parent.mkdir()
    there.touch()
    new = compose_config([*words, *inside, f"model.init={there}", "run.id=c"])
    assert f"--bind {there.parent}:{there.parent}" in render(slurm_job([new]))


def test_nodes_are_looked_at_whether_or_not_there_are_weights_to_begin_from(slurm):
    """That job has a directory of its own, with a config and nothing of a run."""
    check = compose_config(["data=digits", "cluster=slurm_1x8", "model.init=first.pth", "run.id=.doctor-1",
                            "slurm.container=apptainer", "slurm.image=/p.sif"])  # fmt: skip
    check.directory.mkdir(parents=True)
    (check.directory / "config.yaml").touch()
    assert slurm_job([check]).name == ".doctor-1"


def test_a_script_that_cannot_be_made_is_a_finding_of_the_doctor(slurm, shards, capsys):
    assert cli.main(["doctor", "--json", "recipe=bn_x5", "data=folder", f"data.root={shards}", "cluster=slurm_1x8",
                     "data.global_batch_size=24", "model.init=first.pth", "slurm.container=apptainer",
                     "slurm.image=/p.sif"]) == 2  # fmt: skip
    found = json.loads(capsys.readouterr().out)["findings"]
    (said,) = [f for f in found if f["name"] == "job"]
    assert (said["state"], said["way_out"]) == ("fault", "bring the file back, or give another in a new run")
    assert "the check itself failed" not in json.dumps(found)


def test_an_array_is_a_run_for_each_seed(slurm, shards, capsys):
    assert launch(shards, "--array", "3-5%2") == 0
    for number in (3, 4, 5):
        run = slurm / "runs" / f"a-{number}"
        assert read_config(run / "config.yaml").seed == number
        assert (run / "jobs").read_text() == f"41_{number}\n"
    script = (slurm / "runs" / "a-3" / "job.sbatch").read_text()
    assert "#SBATCH --array=3-5%2" in script
    assert f"#SBATCH --output={slurm}/runs/a-%a/logs/job-%A_%a.log" in script


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    assert cli.main(["launch", *arguments]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_errors_name_field_value_rule_and_way_out(slurm, shards, capsys, monkeypatch):
    here = [f"data.root={shards}", "data=folder", "data.global_batch_size=24", "cluster=slurm_1x8"]
    line = refused(capsys, 2, "data=digits")
    assert "cluster.launcher = local: there is nothing to submit; choose cluster=slurm_1x8" in line
    assert cli.main(["train", *here]) == 2
    assert "cluster.launcher = slurm: submit it with `pipeline launch`" in capsys.readouterr().err
    line = refused(capsys, 2, *here, "slurm.container=pyxis")
    assert "slurm.container = pyxis needs an image; set slurm.image" in line
    line = refused(capsys, 2, *here, "slurm.minutes=5")
    assert "slurm.lead_minutes = 5 leaves nothing of slurm.minutes = 5; lower it, or 0 for no signal" in line
    line = refused(capsys, 2, *here, "slurm.resubmit=requeu")
    assert "slurm.resubmit = 'requeu' is not offered; did you mean requeue?" in line
    assert "--array 5-1 gives no number" in refused(capsys, 2, *here, "--array", "5-1")
    assert "--status RUN stands alone" in refused(capsys, 2, "--status", "runs/a", "--cancel", "runs/a")
    assert "runs/b holds no run that was launched" in refused(capsys, 2, "--status", "runs/b")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "sbatch is not found: launch where Slurm's commands are" in refused(capsys, 1, *here)


@pytest.mark.parametrize(("override", "said"), [
    ('slurm.partition="a\nb"', "slurm.partition holds .*a line break"),
    ("slurm.mounts=[data]", "slurm.mounts holds 'data'; write SOURCE"),
    ("slurm.mounts=['/a:/b:rx']", "slurm.mounts holds '/a:/b:rx'; write SOURCE"),
    ("slurm.options=[partition]", "slurm.options holds 'partition', which is no option of sbatch"),
    ("slurm.interface='ib0 eth0'", "slurm.interface = 'ib0 eth0' is no list of names; give them as `ip link`"),
    ("slurm.infiniband='a;b'", "slurm.infiniband = 'a;b' is no list of names"),
    ("slurm.lead_minutes=1", "slurm.lead_minutes = 1 is shorter than cluster.lead_seconds = 120"),
    ("slurm.setup=['export WANDB_API_KEY=abc']", "slurm.setup gives WANDB_API_KEY a value, which would stand in"),
    ("slurm.setup=[\"A=1 HF_TOKEN='x' true\"]", "slurm.setup gives HF_TOKEN a value"),
])  # fmt: skip
def test_what_no_script_can_be_made_of_is_refused_where_it_is_typed(override, said):
    with pytest.raises(ConfigError, match=said):
        compose_config(["data=digits", "cluster=slurm_1x8", override])


def test_setup_may_read_a_secret_from_where_it_is_kept():
    lines = ["export WANDB_API_KEY=$(<~/.wandb)", 'export HF_TOKEN="$(pass hf)"', "export TOKENIZERS_PARALLELISM=false"]
    config = compose_config(["data=digits", "cluster=slurm_1x8", f"slurm.setup={lines!r}"])
    assert config.slurm.setup == lines


def test_a_multirun_is_one_array_whose_elements_find_runs_of_their_own_names(slurm, shards, capsys, monkeypatch):
    more = ("--multirun", "optimizer.rate=0.01,0.02", "seed=0,1")
    assert launch(shards, "--dry-run", *more) == 0
    assert "#SBATCH --array=0-3" in capsys.readouterr().out
    assert not (slurm / "runs").exists()
    assert launch(shards, *more) == 0
    said = capsys.readouterr().out
    names = [f"a-rate_{rate}-seed_{seed}" for rate in ("0.01", "0.02") for seed in (0, 1)]
    (script,) = (slurm / "runs" / ".arrays").glob("*/job.sbatch")
    for number, name in enumerate(names):
        run = slurm / "runs" / name
        assert f"job 41_{number}: {name}, log {run}/logs/job-41_{number}.log" in said
        assert (run / "jobs").read_text() == f"41_{number}\n"
        link = script.parent / f"run-{number}"
        assert link.resolve() == run
        assert of_run(link / "config.yaml").directory == run  # as its ranks read it
        assert (read_config(run / "config.yaml").optimizer.rate, read_config(run / "config.yaml").seed) == (
            float(name[7:11]), number % 2,
        )  # fmt: skip
    assert f"run={script.parent}/run-$SLURM_ARRAY_TASK_ID\n" in script.read_text()
    assert f"--output={script.parent}/run-%a/logs/job-%A_%a.log" in script.read_text()
    assert said.splitlines()[-1].startswith("compare them with: pipeline report runs/a-rate_0.01-seed_0 ")
    assert (slurm / "calls").read_text().count("sbatch --parsable") == 1

    monkeypatch.setenv("QUEUE", "41_2|PENDING|0:00|(Priority)\n")  # one waits: the others are an array of their own
    assert launch(shards, *more) == 0
    assert f"job 41_2: {names[3]}" in capsys.readouterr().out
    assert (slurm / "runs" / names[2] / "jobs").read_text() == "41_2\n"


def test_runs_of_a_multirun_that_ask_slurm_for_different_things_are_refused(slurm, shards, capsys):
    assert launch(shards, "--multirun", "cluster.devices=2,4") == 2
    assert "cluster.devices = 2 and 4: the elements of an array ask for the same" in capsys.readouterr().err
    assert launch(shards, "--multirun", "cluster.workers=2,0") == 2
    assert "cluster.workers = 2 and 0: the elements of an array ask for the same" in capsys.readouterr().err
    assert not (slurm / "runs").exists()
