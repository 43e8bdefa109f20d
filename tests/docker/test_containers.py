"""The image, built as it stands and run: as anyone, on a read-only root, through signals, freezes, kills and new disks.

pytest -m container tests/docker    # see engine.py for what it needs and how a storage is kept
"""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from pipeline.callbacks.journal import read_journal
from pipeline.launch.plan import read_record
from pipeline.training.checkpoint import checkpoints
from tests.docker.engine import Engine, UnavailableError, engine, until
from tests.docker.test_dockerfile import services

pytestmark = [pytest.mark.container, pytest.mark.timeout(3600)]

TRAIN = ["train", "recipe=bn_x5", "data=digits", "data.image_size=16", "data.global_batch_size=12", "model.width=0.125",
         "norm.precise_images=24", "trainer.threads=1",
         "trainer.validate_every_epochs=0", "trainer.checkpoint_every_steps=3", "tracking.every_steps=1",
         "cluster.accelerator=cpu"]  # fmt: skip
KEY, AWS = "0123456789abcdef0123456789abcdef76543210", "plantedsecret/wJalrXUtnFEMIK7MDENG"


@pytest.fixture(scope="session")
def containers():
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("PIPELINE_HEARTBEAT")]:
            patch.delenv(name)
        patch.setenv("AWS_SECRET_ACCESS_KEY", AWS)  # whoever builds has keys
        try:
            opened = engine()
            started = opened.__enter__()
        except UnavailableError as error:
            pytest.skip(str(error))
        try:
            yield started
        finally:
            opened.__exit__(None, None, None)


@pytest.fixture(scope="session")
def image(containers: Engine) -> str:
    return os.environ.get("PIPELINE_IMAGE") or containers.build("runtime", REVISION="tested")


@pytest.fixture
def scratch(tmp_path):
    """A directory that the containers' user may write, and so may nobody else's need to."""
    tmp_path.chmod(0o755)
    place = tmp_path / "scratch"
    place.mkdir()
    os.chown(place, 12345, 0)
    return place


def mount(scratch: Path, inside: str = "/scratch") -> str:
    return f"--volume={scratch}:{inside}"


def steps(run: Path) -> int:
    """How many steps its journal holds."""
    journal = run / "metrics.csv"
    return max((row.step for row in read_journal(journal)), default=0) if journal.exists() else 0


def moved(containers: Engine, name: str, run: Path, count: int) -> None:
    def far_enough() -> bool:
        running = containers("inspect", name, "--format", "{{.State.Running}}") == "true"
        assert running or steps(run) >= count, containers.logs(name)
        return steps(run) >= count

    until(far_enough, f"{run} at step {count}", 400)


def same_bits(one: Path, other: Path) -> None:
    """Weights, momenta, and every loss on the way."""
    ends = [torch.load(checkpoints(run / "checkpoints")[-1], weights_only=True) for run in (one, other)]
    assert ends[0]["global_step"] == ends[1]["global_step"]
    for part in ("state_dict", "optimizer_states"):
        flat = [dict(_tensors(end[part])) for end in ends]
        assert flat[0].keys() == flat[1].keys()
        assert len(flat[0]) > 100
        assert all(torch.equal(flat[0][name], flat[1][name]) for name in flat[0])
    losses = [[(row.step, row.split, row.loss) for row in read_journal(run / "metrics.csv")] for run in (one, other)]
    assert losses[0] == losses[1]


def _tensors(value, name=""):
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(inner, f"{name}/{key}")


def test_the_image_holds_what_it_promises(containers, image):
    config = json.loads(containers("inspect", "--type=image", image))[0]
    assert config["Config"]["User"] == "1000:1000"
    assert config["Config"]["StopSignal"] in ("SIGTERM", "15")
    assert config["Config"]["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    health = config.get("Healthcheck") or config["HealthCheck"]
    assert health["Test"] == ["CMD", "python", "-m", "pipeline.launch.heartbeat"]

    look = ("import pipeline.data.jpeg_region as j; from pipeline import config; from pipeline.launch import slurm;"
            "print(j.__file__, config.CONF, slurm.TEMPLATES)")  # fmt: skip
    run = ["run", "--rm", "--read-only", "--user=12345:0", "--entrypoint"]
    assert containers(*run, "python", image, "-c", look).count("/opt/venv/") == 3
    listed = containers(*run, "cat", image, "/opt/pipeline/LICENCES")
    assert re.search(r"^torch 2\.\S+ +\S", listed, re.MULTILINE)
    assert "not stated" not in listed


def test_doctor_finds_the_image_sound(containers, image, scratch):
    words = ["doctor", "recipe=smoke", "data=digits", "cluster.accelerator=cpu", "run.id=x", "--json"]
    said = containers("run", "--rm", "--read-only", "--user=12345:0", "--shm-size=1g", mount(scratch), image, *words)
    found = json.loads(said)["findings"]
    assert len(found) > 20
    assert [finding for finding in found if finding["state"] == "fault"] == []


def test_anyone_trains_is_told_what_lacks_and_stops_in_time(containers, image, scratch):
    """As an unknown user on a read-only root with 64 MB of shared memory; SIGTERM gives a checkpoint and code 75."""
    options = ["--shm-size=64m", mount(scratch), "--stop-timeout=120"]
    words = [*TRAIN, "trainer.max_steps=400", "cluster.workers=2", "cluster.accelerator=auto", "run.id=stopped"]
    run = scratch / "runs" / "stopped"
    containers.start("anyone", image, words, *options)
    moved(containers, "anyone", run, 3)
    said = containers.logs("anyone")
    assert "hint: devices: no GPU is visible, so this trains on the CPU" in said
    assert "hint: shared memory: /dev/shm has 67.1 MB" in said
    assert "hint: run directory" not in said

    began = time.monotonic()
    containers("stop", "anyone", seconds=130)
    took = time.monotonic() - began
    assert containers.code("anyone", 10) == 75, containers.logs("anyone")
    stopped = int(checkpoints(run / "checkpoints")[-1].stem[5:])
    assert f"interrupted after step {stopped}; its checkpoint is written" in containers.logs("anyone")
    assert read_record(run).starts[-1]["ended"] == "interrupted"
    print(f"stopped after {took:.1f} s at step {stopped}")

    containers.start("anyone", image, [*words, f"trainer.max_steps={stopped + 3}"], *options)
    assert containers.code("anyone", 240) == 0, containers.logs("anyone")
    assert steps(run) == stopped + 3


def test_health_tells_a_frozen_training_from_one_that_goes_on(containers, image, scratch):
    """The health check as it is in the image: two failures, after 60 s without a sign of life."""

    def health() -> str:
        containers("healthcheck", "run", "frozen", check=False)
        return containers("inspect", "frozen", "--format", "{{.State.Health.Status}}")

    words = [*TRAIN, "trainer.max_steps=100000", "run.id=frozen", "tracking.mode=disabled"]
    containers.start("frozen", image, words, mount(scratch))
    moved(containers, "frozen", scratch / "runs" / "frozen", 3)
    assert health() == "healthy"
    training = containers.pid("frozen", "pipeline train")
    os.kill(training, signal.SIGSTOP)
    # Podman counts no failure in the two minutes that a start may take.
    until(lambda: health() == "unhealthy", "a frozen training is unhealthy", 200, every=15)
    os.kill(training, signal.SIGCONT)
    time.sleep(3)
    assert health() == "healthy"
    before = steps(scratch / "runs" / "frozen")
    moved(containers, "frozen", scratch / "runs" / "frozen", before + 2)
    containers("stop", "--time=120", "frozen", seconds=130)
    assert containers.code("frozen", 10) == 75


def test_two_containers_are_two_nodes_and_a_kill_of_one_changes_no_bit(containers, image, scratch):
    """Each the service of docker/compose.yaml, on this machine's network."""
    frozen = [*TRAIN, "cluster.nodes=2", "trainer.max_steps=12", "tracking.mode=disabled"]
    for run in ("left", "killed"):
        command = f"pipeline {' '.join(frozen)} run.id={run} || test -f runs/{run}/config.yaml"
        containers(
            "run", "--rm", "--read-only", "--user=12345:0", mount(scratch), "--entrypoint=sh", image, "-c", command
        )

    def start(run: str, port: int) -> list[str]:
        names = []
        for name in ("node0", "node1"):
            world = {**services()[name]["environment"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            names.append(f"{run}-{name}")
            containers.start(names[-1], image, ["train", f"runs/{run}/config.yaml"], mount(scratch),
                             *[f"--env={key}={value}" for key, value in world.items()])  # fmt: skip
        return names

    for name in start("left", 29411):
        assert containers.code(name, 600) == 0, containers.logs(name)
    first, second = start("killed", 29421)
    moved(containers, first, scratch / "runs" / "killed", 5)
    containers("kill", "--signal=KILL", second)
    assert containers.code(first, 300) == 75, containers.logs(first)
    assert 3 <= int(checkpoints(scratch / "runs" / "killed" / "checkpoints")[-1].stem[5:]) < 12
    for name in start("killed", 29431):
        assert containers.code(name, 600) == 0, containers.logs(name)
    same_bits(scratch / "runs" / "left", scratch / "runs" / "killed")


def test_a_run_on_a_shared_mount_goes_on_in_another_container_with_a_fresh_disk(containers, image, scratch):
    shared, disks = scratch / "shared", [scratch / "disk0", scratch / "disk1"]
    for place in (shared, *disks):
        place.mkdir()
        os.chown(place, 12345, 0)
    words = [*TRAIN, "trainer.max_steps=12", "tracking.mode=disabled"]

    containers.start("whole", image, [*words, "run.id=whole"], mount(disks[0]), mount(shared, "/scratch/runs"))
    assert containers.code("whole", 600) == 0, containers.logs("whole")
    containers.start("first", image, [*words, "run.id=moved"], mount(disks[0]), mount(shared, "/scratch/runs"))
    moved(containers, "first", shared / "moved", 5)
    containers("kill", "--signal=KILL", "first")
    containers.code("first", 10)
    assert not (disks[1] / "shards").exists()
    containers.start("second", image, [*words, "run.id=moved"], mount(disks[1]), mount(shared, "/scratch/runs"))
    assert containers.code("second", 600) == 0, containers.logs("second")
    assert (disks[1] / "shards" / "digits").is_dir()
    same_bits(shared / "whole", shared / "moved")


def test_a_second_container_does_not_take_the_run_of_one_that_is_alive(containers, image, scratch):
    words = [*TRAIN, "trainer.max_steps=100000", "run.id=held", "tracking.mode=disabled"]
    containers.start("holder", image, words, mount(scratch))
    moved(containers, "holder", scratch / "runs" / "held", 1)
    containers.start("intruder", image, words, mount(scratch))
    assert containers.code("intruder", 300) == 1
    assert "belongs to a run that is going on" in containers.logs("intruder")
    assert containers("inspect", "holder", "--format", "{{.State.Running}}") == "true"


def test_a_secret_of_the_environment_is_in_no_layer_log_or_file(containers, image, scratch):
    secrets = {"WANDB_API_KEY": KEY, "AWS_SECRET_ACCESS_KEY": AWS, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    options = [mount(scratch), *(f"--env={name}={value}" for name, value in secrets.items())]
    containers.start("secret", image, [*TRAIN, "trainer.max_steps=6", "run.id=secret"], *options)
    assert containers.code("secret", 600) == 0, containers.logs("secret")
    assert list((scratch / "runs" / "secret" / "wandb").glob("**/*.wandb"))
    layers = containers("image", "mount", image)
    try:
        for place in (layers, scratch):
            for value in (KEY, AWS):
                grep = ["grep", "-rlaF", "--devices=skip", value, place]
                found = subprocess.run(grep, capture_output=True, text=True, check=False)
                assert found.stdout == ""
    finally:
        containers("image", "unmount", image)
    told = [containers.logs("secret"), containers("history", "--no-trunc", image), containers("inspect", image)]
    assert not any(value in text for value in (KEY, AWS) for text in told)
