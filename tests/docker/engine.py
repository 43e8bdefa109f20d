"""Images built and containers run without a daemon: podman and buildah of Debian, as root, in a storage of their own.

No image can be pulled where tests run, so the base is made of Debian's packages, with this machine's certificates.

PIPELINE_CONTAINERS=DIR keeps the storage (20 GB), and the next build takes its layers from it.
PIPELINE_IMAGE=NAME in such a storage is tested as it is, instead of a build of this source.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("podman", "buildah", "runc", "mmdebstrap")
BASE, IMAGE = "localhost/base", "localhost/pipeline-tested"
GIGABYTES = 25  # free, for a build
# runc: Debian's crun stumbles over cgroups that are not ours. Limits are named, or podman asks for more than there are.
CONTAINERS = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
netns = "host"
[engine]
runtime = "runc"
"""
STORAGE = """
[storage]
driver = "overlay"
graphroot = "{home}/store"
runroot = "{home}/run"
"""
PIP = "[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n"


class UnavailableError(Exception):
    """No containers here: the message says why."""


class Engine:
    """Its methods raise CalledProcessError where podman does not do as told."""

    def __init__(self, home: Path):
        self.home = home
        for folder in ("store", "run", "tmp"):
            (home / folder).mkdir(exist_ok=True)
        (home / "containers.conf").write_text(CONTAINERS)
        (home / "storage.conf").write_text(STORAGE.format(home=home))
        self.environment = {
            **os.environ, "CONTAINERS_CONF": str(home / "containers.conf"), "TMPDIR": str(home / "tmp"),
            "CONTAINERS_STORAGE_CONF": str(home / "storage.conf"),
        }  # fmt: skip
        self.started: list[str] = []

    def __call__(self, *words: object, program: str = "podman", seconds: float = 120, check: bool = True) -> str:
        done = subprocess.run([program, *map(str, words)], env=self.environment, text=True, timeout=seconds,
                              capture_output=True, check=False)  # fmt: skip
        assert not check or done.returncode == 0, f"{program} {words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    def build(self, target: str, image: str = IMAGE, **arguments: str) -> str:
        """Build a stage of docker/Dockerfile as it stands, on a base of Debian's packages."""
        if subprocess.run(["podman", "image", "exists", BASE], env=self.environment, check=False).returncode:
            self._make_base()
        words = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        self("bud", "--isolation=chroot", "--network=host", "--format=docker", "--layers", "--build-arg",
             f"BASE_IMAGE={BASE}", *words, "--target", target, "--tag", image, "--file", ROOT / "docker/Dockerfile",
             ROOT, program="buildah", seconds=3000)  # fmt: skip
        return image

    def _make_base(self) -> None:
        tar, pip = self.home / "base.tar", self.home / "pip.conf"
        pip.write_text(PIP)
        pip.chmod(0o644)
        certificates = "/etc/ssl/certs/ca-certificates.crt"
        self("--variant=minbase", "--include=ca-certificates,python3,python3-venv",
             f"--customize-hook=upload {certificates} {certificates}", f"--customize-hook=upload {pip} /etc/pip.conf",
             "bookworm", tar, program="mmdebstrap", seconds=300)  # fmt: skip
        self("import", "--quiet", tar, BASE, seconds=120)
        tar.unlink()

    def start(self, name: str, image: str, words: Sequence[str], *options: object) -> None:
        """Start a container in the background, as a user that nobody knows, on a root that cannot be written."""
        self("rm", "--force", "--ignore", name)
        self("run", "--detach", "--name", name, "--read-only", "--user", "12345:0", *options, image, *words)
        self.started.append(name)

    def logs(self, name: str) -> str:
        done = subprocess.run(["podman", "logs", name], env=self.environment, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, check=False)  # fmt: skip
        return done.stdout

    def code(self, name: str, seconds: float) -> int:
        """The exit code of a container, once it has ended."""
        return int(self("wait", name, seconds=seconds))

    def pid(self, name: str, words: str) -> int:
        """The process of a container, by this machine's numbers, whose command holds these words and is not tini's."""
        table = self("top", name, "hpid", "args").splitlines()[1:]
        return next(int(line.split()[0]) for line in table if words in line and line.split()[1] != "tini")

    def remove(self) -> None:
        for name in self.started:
            self("rm", "--force", "--ignore", name, check=False)


@contextlib.contextmanager
def engine() -> Iterator[Engine]:
    """For as long as a block lasts. Raises UnavailableError."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if os.geteuid() != 0:
        raise UnavailableError("containers of its own need root")
    if missing:
        raise UnavailableError(
            f"{', '.join(missing)} not found: apt-get install --no-install-recommends {' '.join(PROGRAMS)} netavark"
        )
    kept = os.environ.get("PIPELINE_CONTAINERS")
    home = Path(kept) if kept else Path(tempfile.mkdtemp(prefix="pipeline-containers-"))
    free = shutil.disk_usage(home).free
    if free < GIGABYTES * 1e9 and "PIPELINE_IMAGE" not in os.environ:
        raise UnavailableError(f"{home} has {free / 1e9:.0f} GB free, a build takes {GIGABYTES}")
    made = Engine(home)
    try:
        yield made
    finally:
        made.remove()
        if not kept:
            made("system", "reset", "--force", seconds=300, check=False)
            shutil.rmtree(home, ignore_errors=True)


def until(holds: Callable[[], bool], what: str, seconds: float = 120, every: float = 0.2) -> None:
    """Wait until holds() is true; fails with what was waited for."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not after {seconds:.0f} s: {what}"
        time.sleep(every)
