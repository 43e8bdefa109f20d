"""Docker or podman, where this machine has one: does it answer, has it the image, may it have the secrets."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.doctor.findings import OK, Finding, fault, ok, warning
from pipeline.doctor.network import check_host

Run = Callable[[Sequence[str]], str]
_SECONDS = 10.0
_TOOLKIT = "https://docs.nvidia.com/datacenter/cloud-native/container-toolkit"


def run(command: Sequence[str]) -> str:
    """What a command prints. Raises OSError or subprocess.SubprocessError."""
    done = subprocess.run(list(command), capture_output=True, text=True, timeout=_SECONDS, check=True)
    return done.stdout.strip()


def check_engine(engine: str, image: str, gpus: bool, run: Run = run) -> Iterator[Finding]:
    """Whether it is here and answers, knows the image, and can give a container GPUs, where those are wanted."""
    if not shutil.which(engine):
        yield warning("engine", f"{engine} is not found on this machine: nobody was asked for the image",
                      "look, and launch, where containers can be started")  # fmt: skip
        return
    try:
        version = run([engine, "version", "--format", "{{.Server.Version}}"])
    except (OSError, subprocess.SubprocessError) as error:
        yield fault("engine", f"{engine} is here, but does not answer ({_said(error)})",
                    f"see `{engine} info`: is its daemon up, and may this user speak to it?")  # fmt: skip
        return
    yield ok("engine", f"{engine} {version}")
    yield from _check_image(engine, image, run)
    if gpus and engine == "docker":
        try:
            runtimes = run([engine, "info", "--format", "{{json .Runtimes}}{{json .CDISpecDirs}}"])
        except (OSError, subprocess.SubprocessError):
            return
        if "nvidia" not in runtimes and not list(Path("/etc/cdi").glob("nvidia*")):
            yield warning("GPUs", "docker names no NVIDIA runtime: a container would get no GPU",
                          f"install the container toolkit: {_TOOLKIT}")  # fmt: skip


def _check_image(engine: str, image: str, run: Run) -> Iterator[Finding]:
    try:
        run([engine, "image", "inspect", "--format", "{{.Id}}", image])
    except subprocess.CalledProcessError:
        if "/" in image:
            yield warning("image", f"{image} is not on this machine: its registry is asked for it at the start",
                          f"{engine} pull {image}")  # fmt: skip
        else:
            yield fault("image", f"docker.image = {image}, and {engine} has none of that name",
                        f"{engine} build -f docker/Dockerfile -t {image} .")  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        yield warning(
            "image", f"{engine} does not say whether it has {image} ({_said(error)})", f"see `{engine} images`"
        )
    else:
        yield ok("image", f"{image} is here")


def check_env_file(path: Path) -> Iterator[Finding]:
    """Secrets that nobody else can read, a NAME=value a line. Their values are never shown."""
    try:
        status = path.stat()
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        yield fault("secrets", f"docker.env_file = {path}: {getattr(error, 'strerror', None) or 'no text'}",
                    "write it, a NAME=value a line, or leave docker.env_file out")  # fmt: skip
        return
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield fault("secrets", f"docker.env_file = {path} has mode {stat.S_IMODE(status.st_mode):04o}: others can read "
                    "what it holds", f"chmod 600 {path}")  # fmt: skip
        return
    names = [line.partition("=")[0] for line in lines if line.strip() and not line.startswith("#")]
    bad = [number for number, line in enumerate(lines, 1) if line[:1].isspace() or line.startswith("export ")]
    if bad:
        yield fault("secrets", f"docker.env_file = {path}, line {bad[0]} begins with a space or with export",
                    "write NAME=value alone")  # fmt: skip
    else:
        yield ok("secrets", f"{path} is readable for its owner alone: {', '.join(names) or 'no names'}")


def check_variables(names: Sequence[str], environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Variables that are handed on by name."""
    missing = [name for name in names if name not in environment]
    if missing:
        yield warning("variables", f"docker.variables names {', '.join(missing)}, not set here", "export them first")
    elif names:
        yield ok("variables", f"{', '.join(names)} handed on")


def check_address(address: str, nodes: int) -> Iterator[Finding]:
    """Whether the name that the other nodes are told is more than this machine's own word for itself."""
    for finding in check_host(address, nodes):
        if finding.state == OK:
            yield ok("address", finding.text)
        else:
            way_out = "set docker.address to what the other nodes reach the first one by"
            yield fault("address", f'docker.address = "": {finding.text}', way_out)


def _said(error: Exception) -> str:
    lines = (getattr(error, "stderr", "") or "").strip().splitlines()
    return lines[0] if lines else str(error)
