"""The task of a rented run: what it says, that SkyPilot reads it so, and how it goes on or ends on a node."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import cli
from pipeline.cli.settling import settled
from pipeline.config import ConfigError, compose_config, read_config
from pipeline.doctor.cloud import check_checkpoints, check_secrets
from pipeline.launch.cloud import Task, content, job_name, launch_command, render
from pipeline.launch.plan import open_run
from pipeline.launch.targets import cloud_task
from tests.launch.test_slurm import EVIL, program

GOLDEN = Path(__file__).parents[1] / "golden" / "skypilot"
ONE = Task(
    name="first", run="/scratch/runs/first", config=Path("/home/me/lab/runs/first/config.yaml"), nodes=1, devices=1,
    image="registry.example/pipeline:1", bucket="s3://ours/runs", accelerator="H100", secrets=("WANDB_API_KEY",),
)  # fmt: skip
TASKS = {
    "cpu": dataclasses.replace(ONE, accelerator="", cpus="4+", spot=False, secrets=()),
    "1x1": ONE,
    "1x8": dataclasses.replace(ONE, devices=8),
    "4x8": dataclasses.replace(
        ONE, nodes=4, devices=8, infra="aws/us-east-1", cpus="96+", memory="480+", disk_gb=1000,
        secrets=("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"),
    ),
}  # fmt: skip
SECRET = "planted-0123456789abcdef"


@pytest.mark.parametrize("name", TASKS)
def test_the_task_is_the_golden_one(name):
    """Written anew by PIPELINE_WRITE_GOLDEN=1, to be read before it is committed."""
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("PIPELINE_WRITE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(TASKS[name]))
    assert render(TASKS[name]) == path.read_text()


# ---- what SkyPilot reads: its own parser where it is installed, and what 0.14 takes, written down, everywhere

TEXT, NUMBER, TRUTH = str, int, bool
SHAPE: dict[str, Any] = {
    "name": TEXT, "num_nodes": NUMBER,
    "resources": {
        "infra": TEXT, "accelerators": r"[A-Za-z][\w.-]*:[1-9]\d*", "cpus": r"\d+(\.\d+)?\+?",
        "memory": r"\d+(\.\d+)?\+?", "disk_size": NUMBER, "image_id": r"docker:\S+", "use_spot": TRUTH,
        "job_recovery": {"max_restarts_on_errors": NUMBER, "recover_on_exit_codes": [NUMBER]},
    },
    "file_mounts": {
        r"/.*/config\.yaml": r"/.*",
        r"/.*": {"source": r"(s3|gs|r2|oci|nebius)://\S+", "mode": "MOUNT_CACHED",
                 "config": {"mount_cached": {"transfers": NUMBER}}},
    },
    "envs": {r"[A-Za-z_]\w*": TEXT}, "secrets": {r"[A-Za-z_]\w*": None}, "run": TEXT,
}  # fmt: skip


def faults(value: Any, shape: Any = SHAPE, at: str = "") -> list[str]:
    """Where a task differs from what SkyPilot takes."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return [f"{at} is no section"]
        found = []
        for key, inner in value.items():
            known = next((form for pattern, form in shape.items() if re.fullmatch(pattern, str(key))), faults)
            found += [f"{at}.{key} is no key"] if known is faults else faults(inner, known, f"{at}.{key}")
        return found
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{at} is no list"]
        return [line for item in value for line in faults(item, shape[0], at)]
    if isinstance(shape, str):
        return [] if isinstance(value, str) and re.fullmatch(shape, value) else [f"{at} = {value!r} is not read"]
    fits = value is None if shape is None else type(value) is shape
    return [] if fits else [f"{at} = {value!r} has the wrong type"]


def of_skypilot(tasks: dict[str, str], directory: Path) -> dict[str, str]:
    """What SkyPilot's own parser has against each task, "" for nothing."""
    python = os.environ.get("PIPELINE_SKY_PYTHON") or (sys.executable if importlib.util.find_spec("sky") else "")
    if not python:
        pytest.skip("skypilot is not installed; name an interpreter that has it with PIPELINE_SKY_PYTHON")
    for name, text in tasks.items():
        (directory / f"{name}.yaml").write_text(text)
    program = """
import json, sys, sky
said = {}
for name in sys.argv[1:]:
    try:
        task = sky.Task.from_yaml(f"{name}.yaml")
        assert task.run
        said[name] = ""
    except Exception as error:
        said[name] = str(error) or type(error).__name__
print(json.dumps(said))
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HOME": str(directory), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    done = subprocess.run([python, "-c", program, *tasks], cwd=directory, env=environment, capture_output=True,
                          text=True, timeout=120, check=True)  # fmt: skip
    said: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    return said


def planted() -> dict[str, dict[str, Any]]:
    """Tasks with an error each."""
    right = content(TASKS["4x8"])
    wrong: dict[str, dict[str, Any]] = {}

    def plant(name: str, *keys: str, value: Any, instead: str = "") -> None:
        task: Any = copy.deepcopy(right)
        wrong[name] = task
        for key in keys[:-1]:
            task = task[key]
        if instead:
            del task[instead]
        task[keys[-1]] = value

    plant("key", "num_node", value=4, instead="num_nodes")
    plant("nodes", "num_nodes", value="four")
    plant("resource", "resources", "acelerators", value="H100:8", instead="accelerators")
    plant("count", "resources", "accelerators", value="H100:eight")
    plant("codes", "resources", "job_recovery", "recover_on_exit_codes", value=["seventy-five"])
    plant("recovery", "resources", "job_recovery", "recover_on_exit_code", value=[75], instead="recover_on_exit_codes")
    plant("mode", "file_mounts", "/scratch/runs/first", "mode", value="MOUNT_CASHED")
    plant("cache", "file_mounts", "/scratch/runs/first", "config", value={"mount_cached": {"transfer": 1}})
    plant("variable", "envs", "PIPELINE-NODES", value="4", instead="PIPELINE_NODES")
    plant("run", "run", value=["train"])
    return wrong


def test_every_task_has_the_shape_that_skypilot_takes_and_a_planted_error_has_not():
    for name in TASKS:
        assert faults(yaml.safe_load((GOLDEN / f"{name}.yaml").read_text())) == []
    for name, task in planted().items():
        assert len(faults(task)) == 1, name


def test_skypilot_itself_reads_every_task_and_refuses_a_planted_error(tmp_path):
    texts = {name: (GOLDEN / f"{name}.yaml").read_text() for name in TASKS}
    assert of_skypilot(texts, tmp_path) == dict.fromkeys(TASKS, "")
    wrong = {name: yaml.safe_dump(task) for name, task in planted().items()}
    refusals = of_skypilot(wrong, tmp_path)
    # What stands in job_recovery it looks at when the job is taken, or never.
    assert {name for name, said in refusals.items() if not said} <= {"recovery"}


# ---- on a node: the text that SkyPilot runs there


@pytest.fixture
def node(tmp_path):
    """Starts the run section as SkyPilot does, with what it appends; returns the process."""
    program(
        tmp_path,
        "python",
        """
echo "rank of node $PIPELINE_NODE at $MASTER_ADDR:$MASTER_PORT in $PWD for $PIPELINE_TARGET: $*"
trap 'echo told; exit 75' TERM
touch started
[[ -z ${WAITS:-} ]] || { sleep 30 >/dev/null 2>&1 & wait $!; }
exit "${ENDS:-0}" """,
    )
    program(tmp_path, "sleep", '[[ $1 == 120 ]] && echo "sleeps $1" || exec /bin/sleep "$@"')
    started = []

    def start(task: Task, **given: str) -> subprocess.Popen[str]:
        text = f'{content(task)["run"]}\necho "appended after code $?"'
        environment = {**os.environ, **content(task)["envs"], "PIPELINE_PYTHON": str(tmp_path / "python"),
                       "PIPELINE_SCRATCH": str(tmp_path), "SKYPILOT_NODE_RANK": "0",
                       "SKYPILOT_NODE_IPS": "\n".join(f"10.0.0.{n}" for n in range(task.nodes)),
                       "PATH": f"{tmp_path}:{os.environ['PATH']}",
                       "SKYPILOT_NUM_GPUS_PER_NODE": str(task.devices), **given}  # fmt: skip
        started.append(subprocess.Popen(["/bin/bash", "-c", text], env=environment, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True, start_new_session=True))  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=30)[0]


def test_a_node_starts_its_ranks_with_its_number_and_the_address_of_the_first(node, tmp_path):
    output = said(node(TASKS["4x8"], SKYPILOT_NODE_RANK="2"))
    assert output == (
        f"rank of node 2 at 10.0.0.0:29400 in {tmp_path} for skypilot: -m pipeline train /scratch/plan/config.yaml\n"
        "appended after code 0\n"
    )


@pytest.mark.parametrize("given", [
    {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}, {"SKYPILOT_NUM_GPUS_PER_NODE": "4"},
    {"SKYPILOT_NUM_GPUS_PER_NODE": ""},
])  # fmt: skip
def test_other_machines_than_were_asked_for_start_nothing(node, given):
    output = said(node(TASKS["4x8"], **given))
    assert "but this run asked for 4 of 8; launch again with other cluster.nodes and cluster.devices" in output
    assert "appended after code 2" in output
    assert "rank" not in output


def test_a_node_of_no_gpus_is_what_a_run_on_the_cpu_asks_for(node):
    assert "appended after code 0" in said(node(TASKS["cpu"], SKYPILOT_NUM_GPUS_PER_NODE="0"))


@pytest.mark.parametrize("code", ["0", "1", "2", "75"])
def test_what_skypilot_appends_is_reached_whatever_the_code(node, code):
    """It waits there for what the bucket has not got yet."""
    assert f"appended after code {code}\n" in said(node(ONE, ENDS=code))


def test_a_node_that_lost_another_lets_that_one_speak_first(node):
    assert "sleeps 120\nappended after code 75" in said(node(TASKS["4x8"], SKYPILOT_NODE_RANK="1", ENDS="75"))
    assert "sleeps" not in said(node(TASKS["4x8"], SKYPILOT_NODE_RANK="1", ENDS="1"))
    assert "sleeps" not in said(node(TASKS["4x8"], SKYPILOT_NODE_RANK="0", ENDS="75"))


def test_a_notice_reaches_the_ranks_and_their_code_comes_back(node, tmp_path):
    process = node(ONE, WAITS="yes")
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (subshell,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(subshell), signal.SIGTERM)
    assert said(process).endswith("told\nappended after code 75\n")


# ---- what a user gives


def config(*words: str):
    needed = ("skypilot.image=registry.example/pipeline:1", "skypilot.bucket=s3://ours/runs")
    return compose_config(["data=digits", "cluster=skypilot", "run.id=a", *needed, *words])


def test_nothing_that_a_user_gives_changes_the_text_of_another_key():
    run = f"/scratch/runs/{EVIL.replace('/', '')}"
    task = dataclasses.replace(ONE, name=EVIL, run=run, config=Path("/") / EVIL, image=EVIL, infra=EVIL, python=EVIL)
    read = yaml.safe_load(render(task))
    assert read == content(task)
    assert read["run"] == content(ONE)["run"]
    assert read["resources"]["infra"] == EVIL
    assert read["envs"]["PIPELINE_PYTHON"] == EVIL


def test_a_job_has_a_name_that_skypilot_takes_and_no_other_run_has():
    assert job_name("bn-x5-2") == "bn-x5-2"
    names = {job_name(run_id) for run_id in ("a_b", "a.b", "a b", EVIL, "2", "ä", "-", "x" * 300 + ".")}
    assert len(names) == 8
    assert all(re.fullmatch(r"[a-zA-Z][a-zA-Z0-9-]{0,60}", name) for name in names)


def test_a_key_of_wandb_is_handed_on_where_there_is_one():
    file = Path("config.yaml")
    assert cloud_task(config(), file, {}).secrets == ()
    assert cloud_task(config(), file, {"WANDB_API_KEY": "k"}).secrets == ("WANDB_API_KEY",)
    assert cloud_task(config("tracking.mode=offline"), file, {"WANDB_API_KEY": "k"}).secrets == ()
    task = cloud_task(config("skypilot.secrets=[HF_TOKEN]"), file, {"WANDB_API_KEY": "k"})
    command = launch_command(task, Path("sky.yaml"), ["WANDB_API_KEY"])
    assert command[-3:] == ["--secret", "WANDB_API_KEY", "sky.yaml"]  # the other one SkyPilot's server keeps


def test_the_page_writes_checkpoints_often_since_a_notice_is_short():
    there = config()
    assert there.trainer.checkpoint_every_minutes == 2
    (found,) = check_checkpoints(True, there.trainer.checkpoint_every_minutes, 0)
    assert found.state == "ok"
    (found,) = check_checkpoints(True, 30, 0)
    assert found.state == "warning"
    assert list(check_checkpoints(False, 30, 0)) == []
    (found,) = check_secrets(["HF_TOKEN"], {})
    assert (found.state, "HF_TOKEN not set here" in found.text) == ("warning", True)


@pytest.mark.parametrize(("override", "message"), [
    ("skypilot.image=", "skypilot.image is not set, and the nodes must pull one"),
    ("skypilot.bucket=", "skypilot.bucket = '' is no bucket, and a run must outlive its machines"),
    ("skypilot.bucket=/nvme/runs", "skypilot.bucket = /nvme/runs is no bucket"),
    ("skypilot.bucket=s3://Ours", "skypilot.bucket = s3://Ours is no bucket"),
    ("skypilot.accelerator='H100:8'", "skypilot.accelerator = 'H100:8' is no name of one; write it as H100"),
    ("skypilot.cpus=many", "skypilot.cpus = many is not read; write a number"),
    ("skypilot.disk_gb=-1", "skypilot.disk_gb = -1 is too small"),
    ("data.source=photos", "data.root = shards/digits is a directory of this machine, which rented nodes do not see"),
    ('skypilot.infra="a\nb"', "skypilot.infra holds .*a line break"),
])  # fmt: skip
def test_what_no_task_can_be_made_of_is_refused_where_it_is_typed(override, message):
    with pytest.raises(ConfigError, match=message):
        config(override)


def test_weights_of_this_machine_are_refused_while_the_run_has_no_checkpoint(sky, capsys):
    """The way out that is said leads on: nodes find the run in the bucket, this machine that it needs no file more."""
    Path("first.pth").write_bytes(b"weights")
    assert launch("model.init=first.pth") == 2
    line = capsys.readouterr().err
    assert "model.init = first.pth is a file of this machine, which rented nodes do not see, and runs/a has no" in line
    assert "copy the run's directory to s3://ours/runs/a, and its config.yaml and checkpoints to another" in line
    assert not (sky / "calls").exists()
    begun = open_run(settled(compose_config([*HERE, "model.init=first.pth"])))
    copied = sky / "cloud" / "a"
    (copied / "checkpoints").mkdir(parents=True)
    (copied / "checkpoints" / "step-00000002.ckpt").write_bytes(b"")
    shutil.copy(begun.directory / "config.yaml", copied)
    assert launch("model.init=first.pth", "run.dir=cloud") == 0
    assert "jobs launch" in (sky / "calls").read_text()
    frozen = read_config(copied / "config.yaml")
    assert (frozen.model.init, frozen.model.init_digest) == ("first.pth", begun.model.init_digest)


def test_weights_of_this_machine_are_a_finding_of_the_doctor_beside_the_others(sky, capsys):
    Path("first.pth").write_bytes(b"weights")
    assert cli.main(["doctor", "--json", *RENTED, "model.init=first.pth"]) == 2
    found = json.loads(capsys.readouterr().out)["findings"]
    (said,) = [f for f in found if f["section"] == "skypilot" and f["state"] == "fault"]
    assert said["text"].startswith("model.init = first.pth is a file of this machine")
    assert said["way_out"].startswith("train here to a first one")
    assert "the check itself failed" not in json.dumps(found)


def test_a_secret_in_a_bucket_or_a_name_is_not_repeated():
    for override in (f"skypilot.bucket='s3://key:{SECRET}@ours/runs'", f"skypilot.secrets=['TOKEN={SECRET}']"):
        with pytest.raises(ConfigError) as error:
            config(override)
        assert SECRET not in str(error.value)


# ---- launching one


@pytest.fixture
def sky(tmp_path, monkeypatch):
    """A stand-in of sky, which writes its calls down."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    program(
        bin_,
        "sky",
        f"""
echo "$*" >>'{tmp_path}/calls'
[[ $2 != queue ]] || printf '%s' "${{QUEUE:-[]}}"
[[ $2 != launch ]] || exit "${{ENDS:-0}}" """,
    )
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


HERE = ["recipe=smoke", "data=digits", "run.id=a"]
RENTED = [*HERE, "cluster=skypilot", "skypilot.bucket=s3://ours/runs", "skypilot.image=registry.example/pipeline:1"]


def launch(*more: str) -> int:
    return cli.main(["launch", *RENTED, *more])


def test_a_launch_writes_config_and_task_and_submits_them(sky, capfd, monkeypatch):
    assert launch() == 0
    run, out = sky / "runs" / "a", capfd.readouterr().out
    assert (run / "sky.yaml").read_text() in out
    assert faults(yaml.safe_load((run / "sky.yaml").read_text())) == []
    assert f"jobs launch --yes --detach-run --name a {Path('runs/a/sky.yaml')}" in (sky / "calls").read_text()
    frozen = read_config(run / "config.yaml")
    assert frozen.data.digest  # the nodes' data must be these
    assert (frozen.trainer.threads, frozen.data.decoder) == (0, "")  # a node's own
    assert not (run / "run.json").exists()  # the bucket has it
    assert launch() == 0
    monkeypatch.setenv("ENDS", "3")
    assert launch() == 1
    assert "sky did not take the job (code 3), it says above why" in capfd.readouterr().err


def test_a_job_that_goes_on_is_not_submitted_twice(sky, capfd, monkeypatch):
    assert launch() == 0
    job = {"job_id": 7, "job_name": "a", "status": "RECOVERING", "infra": "aws/us-east-1", "recovery_count": 2}
    ended = [{**job, "job_id": 6, "status": "FAILED_SETUP"}, {**job, "job_id": 5, "job_name": "b"}]
    monkeypatch.setenv("QUEUE", json.dumps([job, *ended]))
    assert launch() == 2
    assert "run.id = a has job 7 (RECOVERING aws/us-east-1, recovered 2 times)" in capfd.readouterr().err
    assert cli.main(["launch", "--status", "runs/a"]) == 0
    assert capfd.readouterr().out == ("job 7: RECOVERING aws/us-east-1, recovered 2 times\n"
                                      "its directory is s3://ours/runs/a\n")  # fmt: skip
    assert cli.main(["launch", "--cancel", "runs/a"]) == 0
    assert cli.main(["launch", "--follow", "runs/a"]) == 0
    assert (sky / "calls").read_text().splitlines()[-2:] == ["jobs cancel --yes --name a", "jobs logs --name a"]
    monkeypatch.setenv("QUEUE", "no json")
    assert cli.main(["launch", "--status", "runs/a"]) == 1


def test_without_sky_the_task_is_written_and_the_command_said(sky, capsys, monkeypatch):
    (sky / "bin" / "sky").unlink()
    monkeypatch.setattr("pipeline.launch.attached.shutil.which", lambda name: None)
    assert launch() == 1
    err = capsys.readouterr().err
    assert "sky is not found; where SkyPilot is installed, submit it with: sky jobs launch --yes" in err
    assert (sky / "runs" / "a" / "sky.yaml").exists()
    assert cli.main(["launch", "--cancel", "runs/a"]) == 1
    assert "sky jobs cancel --yes --name a" in capsys.readouterr().err


def test_a_dry_run_shows_the_task_and_leaves_nothing(sky, capsys):
    assert launch("--dry-run") == 0
    out = capsys.readouterr()
    assert faults(yaml.safe_load(out.out)) == []
    assert "the run's directory is s3://ours/runs/a" in " ".join(out.err.split())
    assert not (sky / "calls").exists()
    assert not (sky / "runs").exists()


def test_a_run_that_began_here_is_not_begun_anew_there(sky, capsys):
    (sky / "runs" / "a").mkdir(parents=True)
    (sky / "runs" / "a" / "metrics.csv").write_text("")
    assert launch() == 2
    assert "run.id = a began on this machine, and a rented node does not see runs/a" in capsys.readouterr().err


def test_a_secret_of_the_environment_is_in_nothing_that_is_written_or_said(sky, capfd, monkeypatch):
    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setattr("pipeline.doctor.examination._tracking", lambda config: ())  # would ask the real server
    assert launch("skypilot.secrets=[AWS_SECRET_ACCESS_KEY]") == 0
    out = capfd.readouterr()
    assert SECRET not in out.out + out.err + (sky / "calls").read_text()
    for path in (sky / "runs").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    assert "--secret WANDB_API_KEY --secret AWS_SECRET_ACCESS_KEY" in (sky / "calls").read_text()
    task = yaml.safe_load((sky / "runs" / "a" / "sky.yaml").read_text())
    assert task["secrets"] == {"WANDB_API_KEY": None, "AWS_SECRET_ACCESS_KEY": None}
