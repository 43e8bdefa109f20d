"""A Slurm cluster of its own on this machine, for as long as a test needs it: Debian's packages, root, no systemd.

Each node is a network namespace with an address, a host name and a slurmd. Nothing of the machine is changed: names are
looked up in /etc/netns, which `ip netns exec` lays over /etc. There is one at a time: who comes second waits, and
clears away what a killed one has left. By hand, until Ctrl-C:

    python -m tests.slurm.cluster
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge", "iproute2"]
NODES, CPUS, GPUS = 2, 4, 2  # a node claims what the machine may not have: jobs are told numbers of GPUs, nothing more
BRIDGE, PREFIX, SUBNET = "pltest0", "pltest", "10.87.31"
PORT = 26817  # of the controller; nodes listen on the next, each in its own namespace
LOCK = Path("/run/pltest.lock")  # held while there is one; holds the directory of the last

CONFIG = """
ClusterName=pltest
SlurmctldHost=controller({subnet}.1)
SlurmctldPort={port}
SlurmUser=slurm
AuthType=auth/munge
CredType=cred/munge
# A job that starts again waits until the credential of its last start has expired: 120 s, unless told.
AuthInfo=socket={home}/munge/socket,cred_expire=5
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool.%n
SlurmctldPidFile={home}/state/slurmctld.pid
SlurmdPidFile={home}/slurmd.%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.%n.log
# The machine's cgroups are not ours: processes are found by their parents, and nothing is enforced.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
GresTypes=gpu
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
KillWait=15
MinJobAge=600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
"""
NODE = (
    "NodeName={name} NodeAddr={address} NodeHostname={name} Port={port} CPUs={cpus} RealMemory=16000 Gres=gpu:{gpus}\n"
)


class UnavailableError(Exception):
    """There can be no cluster here: the message says why."""


def install() -> None:
    """Slurm's packages, if they are missing. Raises UnavailableError."""
    if os.geteuid() != 0:
        raise UnavailableError("a cluster of its own needs root")
    if platform.freedesktop_os_release().get("ID") != "debian":
        raise UnavailableError("a cluster of its own needs Debian's packages")
    if all(shutil.which(name) for name in ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare")):
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", *command], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        if done.returncode:
            raise UnavailableError(f"apt-get {command[0]}: {(done.stderr.splitlines() or ['failed'])[-1]}")


@contextlib.contextmanager
def cluster() -> Iterator[Path]:
    """A cluster that runs inside the block; yields its slurm.conf. Raises UnavailableError."""
    install()
    names = [f"{PREFIX}{number + 1}" for number in range(NODES)]
    with LOCK.open("a+") as lock, contextlib.ExitStack() as down:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        _clear(names, lock.read())
        home = Path(tempfile.mkdtemp(prefix="pltest-"))
        home.chmod(0o755)
        down.callback(shutil.rmtree, home, ignore_errors=True)
        lock.truncate(0)
        lock.write(str(home))
        lock.flush()
        conf = _configure(home, names)
        _connect(names, down)
        _begin(home, "munged", ["setpriv", "--reuid=munge", "--regid=munge", "--init-groups", "munged", "--foreground",
               "--force", f"--socket={home}/munge/socket", f"--key-file={home}/munge/key",
               f"--pid-file={home}/munge/pid", f"--log-file={home}/munge/log", f"--seed-file={home}/munge/seed"],
               down)  # fmt: skip
        _until(lambda: _ok("munge", "-n", "-S", f"{home}/munge/socket"), "munged answers")
        os.environ["SLURM_CONF"] = str(conf)
        down.callback(os.environ.pop, "SLURM_CONF", None)
        _begin(home, "controller", ["unshare", "--uts", "sh", "-c", "hostname controller; exec slurmctld -D -c"], down)
        _until(lambda: " UP" in _said("scontrol", "ping"), "slurmctld answers")
        for name in names:
            inside = ["ip", "netns", "exec", name, "unshare", "--uts"]
            _begin(home, name, [*inside, "sh", "-c", f"hostname {name}; exec slurmd -D -N {name}"], down)
        _until(lambda: len(_said("sinfo", "-h", "-N", "-p", "low", "-t", "idle").splitlines()) == NODES, "nodes idle")
        down.callback(_empty)  # first of all: the jobs
        yield conf


def _clear(names: list[str], home: str) -> None:
    """Whatever a cluster that was killed has left: processes of its nodes and of its controller, its network."""
    if not home or not Path(home).is_dir():
        return
    left = [int(pid) for name in names for pid in _said("ip", "netns", "pids", name).split()]
    for file in (Path(home) / "munge" / "pid", Path(home) / "state" / "slurmctld.pid"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(file.read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            left += [pid] if b"munged" in command or b"slurmctld" in command else []
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for number, name in enumerate(names):
        _ok("ip", "link", "del", _cable(number))
        _ok("ip", "netns", "del", name)
        shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
    _ok("ip", "link", "del", BRIDGE)
    shutil.rmtree(home, ignore_errors=True)


def _configure(home: Path, names: list[str]) -> Path:
    for folder, owner in (("munge", "munge"), ("state", "slurm")):
        (home / folder).mkdir(mode=0o755)
        shutil.chown(home / folder, owner, owner)
    key = home / "munge" / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    shutil.chown(key, "munge", "munge")
    conf = home / "slurm.conf"
    nodes = [NODE.format(name=name, address=f"{SUBNET}.{10 + number}", port=PORT + 1, cpus=CPUS, gpus=GPUS)
             for number, name in enumerate(names)]  # fmt: skip
    conf.write_text("".join(nodes) + CONFIG.format(home=home, subnet=SUBNET, port=PORT))
    (home / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    gpus = [home / f"gpu{number}" for number in range(GPUS)]
    for gpu in gpus:
        os.mknod(gpu, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null: Slurm wants a device
    (home / "gres.conf").write_text("".join(f"Name=gpu File={gpu}\n" for gpu in gpus))
    return conf


def _connect(names: list[str], down: contextlib.ExitStack) -> None:
    """A bridge with the controller's address, and a cable from it into each node."""
    _run("ip", "link", "add", BRIDGE, "type", "bridge")
    down.callback(_ok, "ip", "link", "del", BRIDGE)
    _run("ip", "addr", "add", f"{SUBNET}.1/24", "dev", BRIDGE)
    _run("ip", "link", "set", BRIDGE, "up")
    hosts = "127.0.0.1 localhost\n" + "".join(f"{SUBNET}.{10 + number} {name}\n" for number, name in enumerate(names))
    for number, name in enumerate(names):
        _run("ip", "netns", "add", name)
        down.callback(_ok, "ip", "netns", "del", name)
        over = Path("/etc/netns") / name
        over.mkdir(parents=True, exist_ok=True)
        down.callback(shutil.rmtree, over, ignore_errors=True)
        (over / "hosts").write_text(hosts)
        (over / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # nobody answers there: at once, not after 10 s
        cable = _cable(number)
        _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        down.callback(_ok, "ip", "link", "del", cable)
        _run("ip", "link", "set", cable, "master", BRIDGE, "up")
        _run("ip", "-n", name, "addr", "add", f"{SUBNET}.{10 + number}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", "-n", name, "link", "set", device, "up")


def _cable(number: int) -> str:
    return f"{PREFIX}v{number + 1}"


def _begin(home: Path, name: str, command: list[str], down: contextlib.ExitStack) -> None:
    with (home / f"{name}.out").open("w") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    def end() -> None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=10)

    down.callback(end)


def _empty() -> None:
    jobs = set(_said("squeue", "-h", "-o", "%A").split())
    if jobs:
        _ok("scancel", *jobs)
        with contextlib.suppress(UnavailableError):
            _until(lambda: not _said("squeue", "-h"), "the queue is empty", 40)


def _until(holds: Callable[[], bool], what: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise UnavailableError(f"not after {seconds:.0f} s: {what}")
        time.sleep(0.1)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise UnavailableError(f"{' '.join(command)}: {done.stderr.strip()}")


def _ok(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout


if __name__ == "__main__":
    with cluster() as conf, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={conf}", flush=True)
        signal.pause()
