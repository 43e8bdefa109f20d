"""What a container commonly lacks is said in a line, and the command runs whether or not it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import compose_config
from pipeline.doctor.container import check_directory, check_gpus, check_heartbeat, hints

ENTRYPOINT = Path(__file__).parents[2] / "docker" / "entrypoint.sh"


@pytest.fixture
def start(tmp_path):
    """Runs the entry point with a stand-in of `pipeline` that tells what it was given; python is this one."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (bin_ / "pipeline").write_text('#!/bin/sh\necho "pid $$" "$@"; echo "home $HOME"; exit ${CODE:-0}\n')
    for program in bin_.iterdir():
        program.chmod(0o755)

    def run(*words, **environment):
        own = {"PATH": f"{bin_}:/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ENTRYPOINT.parents[1]),
               **environment}  # fmt: skip
        process = subprocess.Popen([ENTRYPOINT, *words], env=own, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)  # fmt: skip
        out, err = process.communicate(timeout=60)
        return process.pid, process.returncode, out.splitlines(), err.splitlines()

    return run


def test_the_command_takes_the_place_of_the_entry_point_and_its_code(start):
    pid, code, out, err = start("evaluate", "runs/a b", CODE="75")
    assert out[0] == f"pid {pid} evaluate runs/a b"
    assert code == 75
    assert err == []


def test_a_training_is_told_what_it_lacks_and_starts_all_the_same(start):
    pid, code, out, err = start("train", "recipe=smoke", "cluster.accelerator=cuda")
    assert out[0] == f"pid {pid} train recipe=smoke cluster.accelerator=cuda"
    assert code == 0
    assert any(line.startswith("hint: devices: no GPU is visible") for line in err)
    assert all(line.startswith("hint: ") for line in err)
    assert start("train", "recipe=smoke", "cluster.accelerator=cuda", PIPELINE_NO_HINTS="1")[3] == []


def test_a_mistake_in_the_words_is_left_to_the_verb(start):
    _, code, out, err = start("train", "recipe=smok")
    assert (code, err) == (0, [])
    assert out[0].endswith("train recipe=smok")


def test_a_user_without_a_home_gets_one(start):
    _, _, out, _ = start("doctor", HOME="/nonexistent")
    home = Path(out[1].removeprefix("home "))
    assert home.is_dir()
    home.rmdir()


def test_the_heartbeat_of_a_killed_start_is_cleared(start, tmp_path):
    beat = tmp_path / "beat"
    beat.touch()
    start("doctor", PIPELINE_HEARTBEAT=str(beat))
    assert not beat.exists()


# --- the hints themselves ---


@pytest.fixture
def dev(tmp_path):
    """A /dev with a GPU and a shared memory that cannot be measured as small: the directory's own file system."""
    (tmp_path / "dev" / "shm").mkdir(parents=True)
    return tmp_path / "dev"


def names(words, tmp_path, dev, **environment):
    config = compose_config(["recipe=smoke", f"run.dir={tmp_path}", *words])
    return [finding.name for finding in hints(config, environment, dev=dev, root=Path("/proc"))]


def test_a_container_that_has_all_is_told_nothing(tmp_path, dev):
    (dev / "nvidia0").touch()
    assert names([], tmp_path, dev) == []


def test_a_gpu_is_missed_unless_the_cpu_was_asked_for(tmp_path, dev):
    assert names([], tmp_path, dev) == ["devices"]
    assert names(["cluster.accelerator=cpu"], tmp_path, dev) == []
    [cuda], [auto] = check_gpus("cuda", 0), check_gpus("auto", 0)
    assert cuda.text == "no GPU is visible, which cluster.accelerator = cuda asks for"
    assert auto.text == "no GPU is visible, so this trains on the CPU"
    assert list(check_gpus("cuda", 1)) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["cluster.workers=0"], []), (["cluster.workers=2"], ["shared memory"]),
     (["cluster.workers=0", "cluster.devices=2"], ["shared memory"]),
     (["cluster.workers=0", "cluster.devices=2", "cluster.accelerator=cpu"], [])],
)  # fmt: skip
def test_little_shared_memory_matters_to_workers_and_to_nccl(tmp_path, dev, monkeypatch, words, expected):
    class Little:
        f_blocks, f_frsize, f_bavail = 16384, 4096, 16384  # 64 MB

    statvfs = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda place: Little if str(place).endswith("shm") else statvfs(place))
    for gpu in range(2):
        (dev / f"nvidia{gpu}").touch()
    assert names(words, tmp_path, dev) == expected


def test_a_run_that_is_gone_with_its_container_is_told(tmp_path):
    [gone] = check_directory(tmp_path / "runs", root=tmp_path)
    assert gone.text == f"{tmp_path / 'runs'} lies in the container and is gone with it"
    assert list(check_directory(tmp_path / "runs", root=Path("/proc"))) == []


def test_a_run_directory_that_cannot_be_written_is_told():
    [finding] = check_directory(Path("/proc/none"))
    assert finding.text.startswith("run.dir: /proc cannot be written")
    assert "--user" in finding.way_out


def test_a_health_check_that_would_see_nothing_is_told(tmp_path):
    [finding] = check_heartbeat({"PIPELINE_HEARTBEAT": "/nonexistent/beat"})
    assert finding.way_out == "docker run --tmpfs /nonexistent"
    assert list(check_heartbeat({"PIPELINE_HEARTBEAT": str(tmp_path / "beat")})) == []
    assert list(check_heartbeat({})) == []


def test_hints_load_nothing_heavy():
    code = (
        "import sys, pipeline.doctor.container; print(any(n in sys.modules for n in ('torch', 'lightning', 'wandb')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
