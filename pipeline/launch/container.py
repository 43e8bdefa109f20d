"""The containers of a run, one a node: a bash script with one `docker run` or `podman run`, rendered from plain values.

Whatever a user gives is one quoted word. A secret is handed on by its name, or by the path of a file: never by its
value.
"""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import normpath
from pathlib import Path, PurePosixPath

SCRIPT = "docker.sh"  # in a run's directory
SCRATCH = "/scratch"  # in the image: its working directory, and the home of caches
LABEL = "pipeline.run"  # of a container: the run's directory
_TAKEN = ("/", "/tmp", SCRATCH)  # noqa: S108  (places in the container that are its own)


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A directory of the host, and where the container sees it."""

    source: Path
    target: str
    writable: bool = False


@dataclass(frozen=True, kw_only=True)
class Container:
    """What the script is made of; fields as in the config's `docker`.

    run, inside: the run's directory, here and as the container is told it. gpus: "" = none. data: what is mounted
    besides the run. stop_seconds: between the signal to end and the end by force. rootless: podman, of no root.
    """

    run: Path
    inside: str
    nodes: int
    image: str
    engine: str = "docker"
    rootless: bool = False
    user: str
    gpus: str = ""
    shared_memory: str = "8g"
    scratch: str = "pipeline-scratch"
    data: tuple[Mount, ...] = ()
    mounts: tuple[str, ...] = ()
    env_file: str = ""
    variables: tuple[str, ...] = ("WANDB_API_KEY",)
    options: tuple[str, ...] = ()
    address: str = ""
    port: int = 29400
    interface: str = ""
    stop_seconds: int = 150


def place(path: str | Path) -> str:
    """Where the container sees a path: an absolute one where it lies, a relative one below its working directory.

    So the frozen config means the same on both sides. Raises ValueError where the container has something of its own.
    """
    target = normpath(PurePosixPath(SCRATCH) / path)
    if target in _TAKEN:
        raise ValueError(f"{path} would cover the container's own {target}; give a directory below it")
    return target


def render(container: Container) -> str:
    """The script as text."""
    c, several = container, container.nodes > 1
    made = [c.run, *(mount.source for mount in c.data if mount.writable)]
    made += [Path(c.scratch)] if c.scratch.startswith("/") else []
    lines = [
        "#!/bin/bash",
        f"# {f'One of {c.nodes} containers' if several else 'The container'} of a run. "
        "`pipeline launch` wrote this file and writes it anew;",
        "# what it says comes from the run's config.yaml (cluster, docker).",
        "set -euo pipefail",
        *(_node(c.nodes) if several else ()),
        f"mkdir -p -- {_words(*map(str, dict.fromkeys(made)))}",
        f"exec {c.engine} run \\",
        *(f"  {line} \\" for line in _options(c)),
        f"  {_words(c.image)} train {_words(f'{c.inside}/config.yaml')}",
    ]
    return "\n".join(lines) + "\n"


def starts(container: Container, script: Path) -> list[str]:
    """The command of each node, in the order of their numbers."""
    return [_words(str(script), str(node)) for node in range(container.nodes)]


def _node(nodes: int) -> list[str]:
    return [
        "",
        "node=${1:-none}",
        f"if [[ ! $node =~ ^(0|[1-9][0-9]*)$ ]] || ((node >= {nodes})); then",
        f'  echo "node $node: give the number of this machine, 0 to {nodes - 1}, each once; 0 has the address that all '
        'are told" >&2',
        "  exit 2",
        "fi",
        "",
    ]


def _options(c: Container) -> list[str]:
    """A line for each part."""
    several = c.nodes > 1
    scratch = f"type={'bind' if c.scratch.startswith('/') else 'volume'}"
    mounts = [_mount(scratch, c.scratch, SCRATCH), _bind(Mount(source=c.run, target=place(c.inside), writable=True))]
    mounts += [_bind(mount) for mount in c.data]
    mounts += [_bind(_of_text(text)) for text in c.mounts]
    variables = ["PIPELINE_TARGET=docker"]
    variables += [f"{library}_SOCKET_IFNAME={c.interface}" for library in ("NCCL", "GLOO") if c.interface]
    variables += [f"MASTER_ADDR={c.address}", f"MASTER_PORT={c.port}"] if several else []
    lines = [
        f"--rm --label={_words(f'{LABEL}={c.run}')} --stop-timeout={c.stop_seconds}",
        f"--user={c.user} --read-only --tmpfs=/tmp:mode=1777 --cap-drop=ALL --security-opt=no-new-privileges",
        *_of_engine(c),
        "--ipc=host" if c.shared_memory == "host" else f"--shm-size={c.shared_memory}",
    ]
    lines += ["--network=host"] if several else []
    lines += [f"--mount={_words(mount)}" for mount in mounts]
    lines += [f"--env={_words(text)}" for text in variables]
    lines += ['--env=PIPELINE_NODE="$node"'] if several else []
    lines += [f"--env={_words(name)}" for name in dict.fromkeys(c.variables)]
    lines += [f"--env-file={_words(c.env_file)}"] if c.env_file else []
    return [*lines, *(_words(option) for option in c.options)]


def _of_engine(c: Container) -> list[str]:
    """What docker and podman say differently: GPUs, and whose files these are."""
    # Memory that NCCL pins, and the stack that its libraries want; both may be more than a user may give.
    limits = "" if c.rootless else "--ulimit=memlock=-1 --ulimit=stack=67108864 "
    if c.engine == "docker":
        wanted = "all" if c.gpus == "all" else f'"device={c.gpus}"'  # docker reads its commas as csv
        return [f"{limits}--gpus={_words(wanted)}"] if c.gpus else []
    # Labels of SELinux would hide directories that are mounted.
    own = ["--userns=keep-id"] if c.rootless else []
    gpus = [f"--device=nvidia.com/gpu={number}" for number in c.gpus.split(",") if number]
    return [" ".join([*own, "--security-opt=label=disable"]), *([limits + " ".join(gpus)] if gpus else [])]


def _of_text(mount: str) -> Mount:
    """SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro."""
    source, target, mode = [*mount.split(":"), "", ""][:3]
    return Mount(source=Path(source), target=target or source, writable=mode != "ro")


def _bind(mount: Mount) -> str:
    return _mount("type=bind", str(mount.source), mount.target, *(() if mount.writable else ("readonly",)))


def _mount(kind: str, source: str, target: str, *more: str) -> str:
    """The value of --mount, which is a line of csv: unlike that of --volume it holds any path."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow([kind, f"source={source}", f"target={target}", *more])
    return line.getvalue()


def _words(*words: str) -> str:
    return shlex.join(words)


def listed(output: str) -> dict[str, str]:
    """Containers by id, with their state, of what `list_command` prints."""
    rows = (line.partition(" ") for line in output.splitlines() if line.strip())
    return {name: state for name, _, state in rows}


def list_command(engine: str, run: Path) -> Sequence[str]:
    """Lists a run's containers on this machine."""
    return (engine, "ps", "--all", "--no-trunc", f"--filter=label={LABEL}={run}", "--format={{.ID}} {{.Status}}")
