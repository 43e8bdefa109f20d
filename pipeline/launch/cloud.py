"""A run as a managed job of SkyPilot: a task file, rendered from plain values, and the commands that speak of it.

The run's directory is a bucket, mounted through a cache on the node's disk (MOUNT_CACHED): there files can be appended
to and renamed, which a bucket mounted directly (MOUNT) refuses, and a checkpoint is written at the speed of the disk
and sent behind it, one file after the other, in the order in which they were closed.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.launch.attached import CommandError, asked
from pipeline.launch.container import SCRATCH

TASK = "sky.yaml"  # in a run's directory
PLAN = f"{SCRATCH}/plan/config.yaml"  # on a node: the config as it was launched
_ENDED = ("SUCCEEDED", "CANCELLED", "FAILED")  # how the names of final states begin

# What a user gives comes as variables, so this text is the same for every run. It is one subshell: SkyPilot appends to
# it a wait for what the bucket has not got yet, which an `exit` would skip. A job fails with its first node's code, and
# all others are killed: one that lost another node (75) therefore waits for the one that knows why, and for the leading
# one, whose files are on their way.
_RUN = """\
(
set -euo pipefail
say() { printf 'node %s: %s\\n' "$SKYPILOT_NODE_RANK" "$*"; }
mapfile -t hosts <<<"$SKYPILOT_NODE_IPS"
if [[ ${#hosts[@]} != "$PIPELINE_NODES" || ${SKYPILOT_NUM_GPUS_PER_NODE:-0} != "$PIPELINE_GPUS" ]]; then
  say "SkyPilot gives ${#hosts[@]} nodes of ${SKYPILOT_NUM_GPUS_PER_NODE:-no} GPUs, but this run asked for" \\
    "$PIPELINE_NODES of $PIPELINE_GPUS; launch again with other cluster.nodes and cluster.devices" >&2
  exit 2
fi
export MASTER_ADDR=${hosts[0]} MASTER_PORT=29400 PIPELINE_NODE=$SKYPILOT_NODE_RANK PIPELINE_TARGET=skypilot
cd "$PIPELINE_SCRATCH"
trap 'kill -s TERM "$!"' TERM INT
"$PIPELINE_PYTHON" -m pipeline train "$PIPELINE_PLAN" &
ranks=$!
while kill -s 0 "$ranks" 2>/dev/null; do wait "$ranks" || true; done # which a signal ends early
code=0
wait "$ranks" || code=$?
if [[ $code == 75 && $SKYPILOT_NODE_RANK != 0 ]]; then
  say "interrupted, and can go on; waiting for the first node to say so"
  sleep 120
fi
exit "$code"
)
"""

_HEAD = """\
# A managed job of SkyPilot. `pipeline launch` wrote this file and writes it anew; what it says comes from the run's
# config.yaml (cluster, skypilot).
"""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the file is made of; fields as in the config's `skypilot`, "" and 0 where nothing is asked of SkyPilot.

    run: the run's directory on a node. config: the launched one, on this machine. secrets: names of variables.
    """

    name: str
    run: str
    config: Path
    nodes: int
    devices: int
    image: str
    bucket: str
    accelerator: str = ""  # "" = none
    infra: str = ""
    cpus: str = ""
    memory: str = ""
    disk_gb: int = 0
    spot: bool = True
    secrets: tuple[str, ...] = ()
    python: str = "/opt/venv/bin/python"


def render(task: Task) -> str:
    """The file as text."""
    text = yaml.dump(content(task), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    return f"{_HEAD}{text}"


def content(task: Task) -> dict[str, Any]:
    """The file's content."""
    resources: dict[str, Any] = {
        "infra": task.infra, "accelerators": f"{task.accelerator}:{task.devices}" if task.accelerator else "",
        "cpus": task.cpus, "memory": task.memory, "disk_size": task.disk_gb,
        "image_id": f"docker:{task.image}", "use_spot": task.spot,
        # A machine that is taken away starts the job again on another; so does a run that says it can go on. Any other
        # end is final: it would end there again.
        "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]},
    }  # fmt: skip
    bucket = {"source": f"{task.bucket.rstrip('/')}/{Path(task.run).name}", "mode": "MOUNT_CACHED",
              "config": {"mount_cached": {"transfers": 1}}}  # fmt: skip
    return {
        "name": task.name,
        "num_nodes": task.nodes,
        "resources": {key: value for key, value in resources.items() if value not in ("", 0) or value is False},
        "file_mounts": {PLAN: str(task.config), task.run: bucket},
        "envs": {
            "PIPELINE_NODES": str(task.nodes), "PIPELINE_GPUS": str(task.devices if task.accelerator else 0),
            "PIPELINE_PYTHON": task.python, "PIPELINE_PLAN": PLAN, "PIPELINE_SCRATCH": SCRATCH,
        },
        # By name: `sky jobs launch --secret NAME` hands on what is set there.
        **({"secrets": dict.fromkeys(task.secrets)} if task.secrets else {}),
        "run": _RUN,
    }  # fmt: skip


def job_name(run_id: str) -> str:
    """A name of SkyPilot's for a run: its id where that is one, else what is left of it and a number of its own."""
    if re.fullmatch(r"[a-zA-Z][a-zA-Z0-9-]*", run_id):
        return run_id
    left = re.sub(r"[^a-zA-Z0-9]+", "-", run_id).strip("-")[:40]
    return f"run-{left}-{zlib.crc32(run_id.encode()):08x}"


def launch_command(task: Task, path: Path, here: Sequence[str]) -> list[str]:
    """Submits it. here: names of secrets that are set on this machine; the others SkyPilot must know itself."""
    secrets = [word for name in task.secrets if name in here for word in ("--secret", name)]
    return ["sky", "jobs", "launch", "--yes", "--detach-run", "--name", task.name, *secrets, str(path)]


def states(name: str) -> dict[str, str]:
    """Jobs of that name that have not ended, the newest first: state, and where. Raises CommandError."""
    said = asked("sky", "jobs", "queue", "--skip-finished", "--output", "json")
    try:
        jobs = json.loads(said)
        return {
            str(job["job_id"]): f"{job['status']} {job.get('infra') or ''}, recovered {job.get('recovery_count') or 0} "
            "times"
            for job in jobs
            if job["job_name"] == name and not str(job["status"]).startswith(_ENDED)
        }
    except (ValueError, TypeError, KeyError):
        raise CommandError("sky jobs queue says what is not understood here; see `sky jobs queue`") from None


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # yaml has no types
    """Text of several lines as a block that can be read."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if text.endswith("\n") else None)


_Dumper.add_representer(str, _text)
