"""Containers of a run: what their script says, that docker and podman read it so, and how a launch of one ends."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.config import ConfigError, compose_config, read_config
from pipeline.doctor.engine import check_engine, check_env_file
from pipeline.launch.container import Container, Mount, place, render
from pipeline.launch.plan import read_record
from pipeline.launch.targets import container_of
from tests.launch.test_slurm import EVIL, program

GOLDEN = Path(__file__).parents[1] / "golden" / "docker"
DIGITS = Mount(source=Path("/home/me/lab/shards/digits"), target="/scratch/shards/digits")
ONE = Container(
    run=Path("/home/me/lab/runs/first"), inside="runs/first", nodes=1, image="pipeline", user="1000:1000",
    data=(DIGITS,),
)  # fmt: skip
GPUS = dataclasses.replace(
    ONE, gpus="all", env_file="/home/me/secrets.env", variables=("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"),
    mounts=("/etc/site:/etc/site:ro", "/nvme"), scratch="/nvme/scratch",
)  # fmt: skip
CONTAINERS = {
    "1x1": ONE,
    "1x8": GPUS,
    "4x8": dataclasses.replace(
        GPUS, run=Path("/shared/runs/first"), inside="/shared/runs/first", nodes=4, address="node1", interface="ib0",
        options=("--device=/dev/infiniband",),
        data=(Mount(source=Path("/nvme/cache"), target="/cache", writable=True),),
    ),
    "some_gpus": dataclasses.replace(ONE, gpus="2,3", shared_memory="host"),
    "podman": dataclasses.replace(GPUS, engine="podman", gpus="0,1"),
    "podman_rootless": dataclasses.replace(GPUS, engine="podman", rootless=True),
}  # fmt: skip
SECRET = "planted-0123456789abcdef"


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_script_is_the_golden_one(name):
    """Written anew by PIPELINE_WRITE_GOLDEN=1, to be read before it is committed."""
    path = GOLDEN / f"{name}.sh"
    if os.environ.get("PIPELINE_WRITE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(CONTAINERS[name]))
    assert render(CONTAINERS[name]) == path.read_text()


def test_scripts_pass_shellcheck():
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    scripts = sorted(GOLDEN.glob("*.sh"))
    assert len(scripts) == len(CONTAINERS)
    done = subprocess.run([shellcheck, *map(str, scripts)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def words(container: Container, directory: Path, node: str = "0") -> list[str]:
    """What the script gives docker or podman, in the words that bash makes of it."""
    bin_ = directory / "bin"
    bin_.mkdir(exist_ok=True)
    for name in ("docker", "podman"):
        program(bin_, name, f"printf '%s\\0' \"$@\" >'{directory}/words'")
    program(bin_, "mkdir", "exit 0")
    environment = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}"}
    done = subprocess.run(["/bin/bash", "-c", render(container), "script", node], env=environment, cwd=directory,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return (directory / "words").read_text().split("\0")[:-1]


# ---- the parsers of docker and podman themselves


def refusal_of_docker(command: list[str]) -> str:
    """What docker's own parser has against it, "" for nothing: there is no daemon behind it that would go on."""
    docker = shutil.which("docker")
    if docker is None:
        pytest.skip("docker's client is not installed")
    version = subprocess.run([docker, "--version"], capture_output=True, text=True, check=False).stdout
    if not version.startswith("Docker"):
        pytest.skip("docker is another program here")
    done = subprocess.run([docker, *command], env={**os.environ, "DOCKER_HOST": "unix:///nowhere"}, text=True,
                          capture_output=True, timeout=30, check=False)  # fmt: skip
    assert done.returncode
    return "" if "Cannot connect to the Docker daemon" in done.stderr else done.stderr.strip().splitlines()[0]


@pytest.fixture(scope="module")
def podman(tmp_path_factory):
    """Creates a container of the words of `podman run`, and returns podman's refusal, "" for none."""
    if shutil.which("podman") is None or os.getuid() != 0:
        pytest.skip("podman is not installed, or this is not root")
    root = tmp_path_factory.mktemp("podman")
    (root / "storage.conf").write_text(
        f'[storage]\ndriver = "vfs"\ngraphroot = "{root}/store"\nrunroot = "{root}/run"\n'
    )
    (root / "containers.conf").write_text('[containers]\nnetns = "host"\n')
    environment = {**os.environ, "CONTAINERS_STORAGE_CONF": f"{root}/storage.conf",
                   "CONTAINERS_CONF": f"{root}/containers.conf"}  # fmt: skip
    with tarfile.open(root / "empty.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("empty"), io.BytesIO())

    def said(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["podman", *command], env=environment, text=True, capture_output=True, timeout=60,
                              check=False)  # fmt: skip

    made = said("import", "--quiet", str(root / "empty.tar"), "localhost/pipeline")
    if made.returncode:
        pytest.skip(f"podman cannot make an image here: {made.stderr.strip().splitlines()[-1]}")

    def refusal(command: list[str]) -> str:
        done = said("create", *command[1:])
        return done.stderr.strip() if done.returncode else ""

    yield refusal
    said("system", "reset", "--force")


@pytest.mark.parametrize("name", [name for name in CONTAINERS if not name.startswith("podman")])
def test_docker_reads_the_command(name, tmp_path):
    # Its client would read the file, and ask the server how to read a device.
    container = dataclasses.replace(CONTAINERS[name], env_file="", options=())
    assert refusal_of_docker(words(container, tmp_path)) == ""


PLANTED = [
    ("--shm-size=8g", "--shm-sise=8g", "unknown flag: --shm-sise"),
    ("--shm-size=8g", "--shm-size=8x", "invalid argument"),
    ("--stop-timeout=150", "--stop-timeout=soon", "invalid argument"),
    ("--env=WANDB_API_KEY", "--env==value", "invalid environment variable"),
    ("--gpus=all", "--gpus=al", "invalid argument"),
    ("--ulimit=memlock=-1", "--ulimit=memlok=-1", "invalid argument"),
    ("target=/scratch/shards/digits,readonly", "target=/scratch/shards/digits,readonyl", "invalid argument"),
]


@pytest.mark.parametrize(("right", "wrong", "said"), PLANTED)
def test_a_planted_error_is_refused_by_docker(right, wrong, said, tmp_path):
    command = words(dataclasses.replace(GPUS, env_file="", data=(DIGITS,)), tmp_path)
    planted = [word.replace(right, wrong) for word in command]
    assert planted != command
    assert said in refusal_of_docker(planted)


def test_podman_makes_a_container_of_the_command(podman, tmp_path):
    here = dataclasses.replace(
        ONE, engine="podman", image="localhost/pipeline", run=tmp_path / "runs" / "a,b \"c\"", nodes=2, address="node1",
        data=(Mount(source=tmp_path, target="/scratch/shards"),), user="0:0",
    )  # fmt: skip
    here.run.mkdir(parents=True)
    command = words(here, tmp_path)
    assert podman(command) == ""
    planted = [word.replace("--stop-timeout", "--stop-timout") for word in command]
    assert "unknown flag: --stop-timout" in podman(planted)
    planted = [word.replace("type=volume", "type=volum") for word in command]
    assert "volum" in podman(planted)


# ---- what a user gives


def test_nothing_that_a_user_gives_gets_out_of_its_quotes(tmp_path):
    evil = EVIL.replace("/", "")
    container = dataclasses.replace(
        GPUS, run=tmp_path / evil, inside=f"runs/{evil}", nodes=2, image=EVIL, address=EVIL, interface=EVIL,
        env_file=f"/{evil}", scratch=f"/{evil}", mounts=(f"/{evil}:/x:ro",), options=(f"--label={EVIL}",),
        data=(Mount(source=tmp_path / f"{evil},\"", target="/x y"),),
    )  # fmt: skip
    command = words(container, tmp_path, "1")
    assert command[-3:] == [EVIL, "train", f"runs/{evil}/config.yaml"]
    assert f"--label={EVIL}" in command
    assert f"--env=MASTER_ADDR={EVIL}" in command
    assert "--env=PIPELINE_NODE=1" in command
    assert f"--env-file=/{evil}" in command
    mounts = [word for word in command if word.startswith("--mount")]
    assert any('""' in word and word.endswith(",target=/x y,readonly") for word in mounts)  # csv doubles a quote
    assert list(tmp_path.rglob("hacked")) == []


@pytest.mark.parametrize("node", ["", "4", "-1", "a", "1 1", "01"])
def test_a_node_that_is_none_starts_nothing(node, tmp_path):
    done = subprocess.run(["/bin/bash", "-c", render(CONTAINERS["4x8"]), "docker.sh", *([node] if node else [])],
                          capture_output=True, text=True, cwd=tmp_path, check=False)  # fmt: skip
    assert done.returncode == 2
    assert "give the number of this machine, 0 to 3, each once" in done.stderr


def test_weights_to_begin_from_are_mounted_and_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("weights").mkdir()
    Path("weights/first.pth").touch()
    container = container_of(config("model.init=weights/first.pth", "data.root=/data/shards", "tracking.mode=disabled"))
    mount = next(m for m in container.data if m.target.endswith("first.pth"))
    assert (mount.source, mount.target, mount.writable) == (
        Path("weights/first.pth").absolute(), "/scratch/weights/first.pth", False,
    )  # fmt: skip


def test_weights_that_are_gone_are_not_mounted_and_missed_only_without_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun = config("model.init=weights/first.pth", "data.root=/data/shards")
    with pytest.raises(ConfigError) as error:
        container_of(begun)
    assert str(error.value) == (
        "model.init = weights/first.pth is no file, and runs/a has no checkpoint that would do without it; bring the "
        "file back, or give another in a new run"
    )
    (begun.directory / "checkpoints").mkdir(parents=True)
    (begun.directory / "checkpoints" / "step-00000002.ckpt").touch()
    assert [mount.target for mount in container_of(begun).data] == ["/data/shards"]


def test_weights_that_are_gone_are_a_finding_of_the_doctor_beside_the_others(engine, shards, capsys):
    words = ["recipe=bn_x5", "data=folder", f"data.root={shards}", "cluster=docker", "model.init=first.pth"]
    assert cli.main(["doctor", "--json", *words, "data.global_batch_size=24"]) == 2
    found = json.loads(capsys.readouterr().out)["findings"]
    (said,) = [f for f in found if f["section"] == "docker"]
    assert (said["state"], said["way_out"]) == ("fault", "bring the file back, or give another in a new run")
    assert "the check itself failed" not in json.dumps(found)


def test_a_path_means_the_same_on_both_sides():
    assert place("runs/first") == "/scratch/runs/first"
    assert place("/data/runs/first") == "/data/runs/first"
    assert place("../runs") == "/runs"
    for taken in (".", "/", "/tmp", "/scratch", "a/.."):
        with pytest.raises(ValueError, match="would cover the container's own"):
            place(taken)


def config(*words: str):
    return compose_config(["data=digits", "cluster=docker", "run.id=a", *words])


def test_a_container_is_given_gpus_where_the_run_is_on_them_and_this_machine_has_some(tmp_path):
    there, nowhere = tmp_path, tmp_path / "none"
    assert container_of(config(), nowhere).gpus == ""
    assert container_of(config(), there).gpus == "all"
    assert container_of(config("cluster.accelerator=cpu"), there).gpus == ""
    assert container_of(config("cluster.accelerator=cuda", 'docker.gpus="2,3"'), nowhere).gpus == "2,3"


def test_a_container_has_time_for_the_last_checkpoint_and_some():
    assert container_of(config()).stop_seconds == 150
    assert container_of(config("cluster.lead_seconds=300.5")).stop_seconds == 331


def test_data_of_a_server_is_not_mounted_and_a_cache_can_be_written():
    container = container_of(config("data.root=s3://ours/shards", "data.cache=/nvme/cache", "tracking.mode=disabled"))
    assert container.data == (Mount(source=Path("/nvme/cache"), target="/nvme/cache", writable=True),)
    assert container.variables == ()


@pytest.mark.parametrize(("override", "said"), [
    ("docker.image=", "docker.image = '' names no image"),
    ("docker.image=--privileged", "docker.image = '--privileged' names no image"),
    ('docker.image="a\nb"', "docker.image holds .*a line break"),
    ("docker.engine=dockr", "docker.engine = 'dockr' is not offered; did you mean docker?"),
    ("docker.user=me", "docker.user = me is not read; write numbers"),
    ("docker.gpus=0", "docker.gpus = 0 are fewer than cluster.devices = 2"),
    ("docker.gpus=two", "docker.gpus = two is not read"),
    ("docker.shared_memory=8x", "docker.shared_memory = 8x is no size"),
    ("docker.scratch=a/b", "docker.scratch = a/b is neither the name of a volume nor an absolute directory"),
    ("docker.mounts=[data]", "docker.mounts holds 'data'; write SOURCE"),
    ("docker.options=[gpus]", "docker.options holds 'gpus', which is no option of docker run"),
    ("docker.options=['--env=A=b']", "docker.options holds an --env, which may be a secret"),
    ("docker.port=80", "docker.port = 80 must lie between"),
])  # fmt: skip
def test_what_no_command_can_be_made_of_is_refused_where_it_is_typed(override, said):
    with pytest.raises(ConfigError, match=said):
        config("cluster.devices=2", override)


def test_a_secret_that_is_typed_as_a_variable_is_not_repeated():
    with pytest.raises(ConfigError, match=r"docker\.variables holds 'TOKEN' with more than a name") as error:
        config(f"docker.variables=['TOKEN={SECRET}']")
    assert SECRET not in str(error.value)


# ---- launching one


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """A stand-in of docker, which writes its calls down, and ends a run with $ENDS."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    program(
        bin_,
        "docker",
        f"""
echo "$*" >>'{tmp_path}/calls'
case $1 in
  run) trap 'echo signalled; exit 75' TERM; touch '{tmp_path}/started'
       [[ -z ${{WAITS:-}} ]] || {{ sleep 30 >/dev/null 2>&1 & wait; }}
       exit "${{ENDS:-0}}" ;;
  ps) printf '%b' "${{PS:-}}" ;;
  image) [[ $5 != absent ]] ;;
  version) echo 28.0 ;;
esac""",
    )
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(shards: Path, *more: str) -> int:
    return cli.main(["launch", "recipe=bn_x5", "data=folder", f"data.root={shards}", "data.global_batch_size=24",
                     "cluster=docker", "cluster.devices=2", "cluster.accelerator=cpu", "run.id=a", *more])  # fmt: skip


def test_a_launch_freezes_the_run_starts_its_container_and_hands_its_code_on(engine, shards, capfd, monkeypatch):
    assert launch(shards) == 0
    run, said = engine / "runs" / "a", capfd.readouterr().out
    assert (run / "docker.sh").read_text() in said
    assert stat.S_IMODE((run / "docker.sh").stat().st_mode) == 0o755
    assert "train runs/a/config.yaml" in (engine / "calls").read_text()
    frozen = read_config(run / "config.yaml")
    assert (frozen.world, frozen.data.num_classes, frozen.data.decoder) == (2, 5, "")  # the image has its own
    assert read_record(run).starts == []  # noted where it begins
    assert not (run / ".lock").exists()
    for ends, code in (("75", 75), ("3", 3), ("137", 75), ("125", 1)):
        monkeypatch.setenv("ENDS", ends)
        assert launch(shards) == code
    assert "docker did not start the container (code 125), it says above why" in capfd.readouterr().err


def test_a_signal_reaches_the_container(engine, shards, monkeypatch):
    monkeypatch.setenv("WAITS", "yes")
    command = [sys.executable, "-m", "pipeline", "launch", "recipe=bn_x5", "data=folder", f"data.root={shards}",
               "data.global_batch_size=24", "cluster=docker", "run.id=a"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 240
        while not (engine / "started").exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 75
    assert output.endswith("signalled\n")


def test_several_nodes_are_a_command_for_each(engine, shards, capsys):
    assert launch(shards, "cluster.nodes=2", "docker.address=node1") == 0
    said = capsys.readouterr().out
    script = engine / "runs" / "a" / "docker.sh"
    assert f"  {script} 0\n  {script} 1\n" in said
    assert "the first is node1" in said
    assert "run --rm" not in (engine / "calls").read_text()


def test_a_dry_run_shows_the_command_and_leaves_nothing(engine, shards, capsys):
    assert launch(shards, "--dry-run") == 0
    said = capsys.readouterr()
    assert said.out.startswith("#!/bin/bash\n# The container of a run.")
    assert "ok image pipeline is here" in " ".join(said.err.split())
    assert "run --rm" not in (engine / "calls").read_text()
    assert not (engine / "runs").exists()


def test_doctor_keeps_a_container_without_an_image_from_starting(engine, shards, capsys):
    assert launch(shards, "docker.image=absent") == 2
    table = " ".join(capsys.readouterr().err.split())
    assert "docker.image = absent, and docker has none of that name -> docker build -f docker/Dockerfile" in table
    assert "not submitted; mend what is at fault" in table
    assert not (engine / "runs").exists()


def test_doctor_wants_secrets_that_nobody_else_can_read(tmp_path):
    path = tmp_path / "secrets.env"
    (missing,) = check_env_file(path)
    assert (missing.state, "No such file" in missing.text) == ("fault", True)
    path.write_text(f"TOKEN={SECRET}\n# a comment\n")
    path.chmod(0o640)
    (open_,) = check_env_file(path)
    assert (open_.state, open_.way_out) == ("fault", f"chmod 600 {path}")
    path.chmod(0o600)
    (found,) = check_env_file(path)
    assert (found.state, SECRET in found.text, "TOKEN" in found.text) == ("ok", False, True)
    path.write_text("export TOKEN=a\n")
    (exported,) = check_env_file(path)
    assert "line 1 begins with a space or with export" in exported.text


def test_doctor_tells_a_daemon_that_does_not_answer(engine):
    def run(command):
        raise subprocess.CalledProcessError(1, command, stderr="Cannot connect to the Docker daemon")

    (found,) = check_engine("docker", "pipeline", False, run)
    assert (found.state, "Cannot connect to the Docker daemon" in found.text) == ("fault", True)


def test_a_secret_of_the_environment_is_in_nothing_that_is_written_or_said(engine, shards, capfd, monkeypatch):
    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    (engine / "secrets.env").write_text(f"TOKEN={SECRET}\n")
    (engine / "secrets.env").chmod(0o600)
    assert launch(shards, "docker.variables=[AWS_SECRET_ACCESS_KEY]", "docker.env_file=secrets.env",
                  "tracking.mode=offline") == 0  # fmt: skip
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err + (engine / "calls").read_text()
    for path in (engine / "runs").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    assert "--env=AWS_SECRET_ACCESS_KEY " in (engine / "calls").read_text()
    assert f"--env-file={engine}/secrets.env" in (engine / "calls").read_text()


def test_status_and_cancel_speak_of_the_containers_of_the_run(engine, shards, capsys, monkeypatch):
    assert launch(shards) == 0
    monkeypatch.setenv("PS", f"{'c' * 64} Up 5 seconds\\n")
    assert cli.main(["launch", "--status", "runs/a"]) == 0
    assert "container cccccccccccc: Up 5 seconds" in capsys.readouterr().out
    assert cli.main(["launch", "--cancel", "runs/a"]) == 0
    assert f"stop {'c' * 64}" in (engine / "calls").read_text()
    assert cli.main(["launch", "--follow", "runs/a"]) == 0
    assert f"logs --follow --tail=100 {'c' * 64}" in (engine / "calls").read_text()
    assert f"--filter=label=pipeline.run={engine}/runs/a" in (engine / "calls").read_text()


def test_a_launch_without_an_engine_says_so_and_train_says_who_launches(engine, shards, capsys, monkeypatch):
    assert launch(shards, "--array", "0-3") == 2
    assert "--array 0-3 is for Slurm, and cluster.launcher = docker" in capsys.readouterr().err
    assert cli.main(["train", "data=digits", "cluster=docker"]) == 2
    assert "cluster.launcher = docker: submit it with `pipeline launch`" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nowhere")
    assert launch(shards) == 1
    assert "docker and podman are not found: launch where containers can be started" in capsys.readouterr().err
