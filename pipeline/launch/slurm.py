"""The Slurm job of a run: one bash script, rendered from slurm/job.sbatch, that starts the run and starts it again.

Whatever a user gives is quoted: it reaches sbatch, bash and the container's tool as the one word that it is. Lines of
`setup` alone are taken as bash.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

_BESIDE, _INSIDE = Path(__file__).parents[2] / "slurm", Path(__file__).parents[1] / "slurm"
TEMPLATES = _INSIDE if _INSIDE.is_dir() else _BESIDE  # inside the package once it is built as a wheel
SCRIPT, JOBS = "job.sbatch", "jobs"  # in a run's directory: the script, and the jobs it became, one a line
ALONE = "nodes.sbatch"  # the template of a check without a run
CHECK_SECONDS = 420  # of a check; ranks have 120 s to come, and 60 to measure
WAIT_SECONDS = 240  # of srun for the others once a rank has ended: before that rank 0 has said which one never came
_PLAIN = re.compile(r"[\w./:=,@%+-]+", re.ASCII)
_PLACE = re.compile(r"@\{(\w+)\}")  # of a part in the template
_MOST = 10_000  # runs of an array; Slurm's own bound is 1,000 where its MaxArraySize was not raised
_ARRAY = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*(%[1-9]\d*)?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the script is made of; fields as in the config's `slurm`, "" and 0 where nothing is asked of Slurm.

    run: the run's directory, or with array what stands before "-<number>" in the directories of its runs.
    draws: each run asks its sweep for its parameters before its first start.
    places: directories that a container must see. made: those of them that a node may lack before.
    directory: where the job runs, which relative paths start from.
    """

    name: str
    run: Path
    script: Path
    directory: Path
    nodes: int
    devices: int
    threads: int
    python: str
    array: str = ""
    draws: bool = False
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    exclude: str = ""
    memory: str = ""
    minutes: int = 0
    lead_minutes: int = 0
    cpus_per_task: int = 0
    gpus_per_node: int = 0
    options: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    container: str = "none"
    image: str = ""
    mounts: tuple[str, ...] = ()
    places: tuple[Path, ...] = ()
    made: tuple[Path, ...] = ()
    launcher: str = "srun"
    resubmit: str = "requeue"
    restarts: int = 0
    interface: str = ""
    infiniband: str = ""
    check: bool = False

    @property
    def tasks_per_node(self) -> int:
        return self.devices if self.launcher == "srun" else 1


def render(job: Job) -> str:
    """The script as text."""
    parts = _parts(job) | {
        "script": shlex.quote(str(job.script)),
        "nodes": str(job.nodes),
        "tasks": str(job.nodes * job.tasks_per_node),
        "restarts": str(job.restarts),
        "draw": _draw(job) if job.draws else "",
        "check": _check(job) if job.check else "",
        "task": _lines(_task(job, "train")),
        "resubmit": _template(f"{job.resubmit}.sh"),
    }
    return _filled(_template(SCRIPT), parts)


def render_check(job: Job, timeout: float = 0.0) -> str:
    """A script that lets every rank look, and ends with its code. timeout: seconds for ranks to come; 0 = as they are.

    The code is left in the run's directory as logs/code.
    """
    return _filled(_template(ALONE), _parts(job) | {"check": _check(job, timeout)})


def _parts(job: Job) -> dict[str, str]:
    """What every script has."""
    return {
        "header": "\n".join(f"#SBATCH {_header_word(option)}" for option in header(job)),
        "run": shlex.quote(str(job.run)) + ("-$SLURM_ARRAY_TASK_ID" if job.array else ""),
        "environment": "\n".join(_environment(job)),
        "ranks": _template("ranks.sh"),
    }


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text().rstrip("\n")


def _filled(template: str, parts: dict[str, str]) -> str:
    """With its parts in their places, and a line break at its end."""
    return _PLACE.sub(lambda place: parts[place[1]], template) + "\n"


def header(job: Job) -> list[str]:
    """Options of sbatch."""
    logs = str(job.run).replace("%", "%%") + ("-%a" if job.array else "")
    cpus = job.cpus_per_task * (job.devices // job.tasks_per_node)
    asked = {
        "job-name": job.name, "partition": job.partition, "account": job.account, "qos": job.qos,
        "constraint": job.constraint, "exclude": job.exclude, "nodes": job.nodes,
        "ntasks-per-node": job.tasks_per_node, "cpus-per-task": cpus, "gpus-per-node": job.gpus_per_node,
        "mem": job.memory, "time": job.minutes, "array": job.array, "chdir": job.directory,
        "output": f"{logs}/logs/job-{'%A_%a' if job.array else '%j'}.log",
    }  # fmt: skip
    options = [f"--{name}={value}" for name, value in asked.items() if value not in ("", 0)]
    # Without B: it goes to the ranks. Appended: a requeued job would empty its log.
    signal = [f"--signal=USR2@{60 * job.lead_minutes}"] if job.lead_minutes else []
    return [*options, "--requeue", "--open-mode=append", *signal, *job.options]


def array_numbers(text: str) -> list[int]:
    """Numbers of sbatch's --array: 0-5%2 is [0, 1, 2, 3, 4, 5], two of them at a time. Raises ValueError."""
    if not _ARRAY.fullmatch(text):
        raise ValueError(f"--array {text} is not read; write numbers and ranges, as 0-5 or 1,4,7-9%2 (2 at a time)")
    numbers: list[int] = []
    for part in text.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        more = range(int(first), int(last or first) + 1)
        if len(numbers) + len(more) > _MOST:
            raise ValueError(f"--array {text} gives more than {_MOST:,} runs; launch them in parts, as 0-999 and "
                             "1000-1999")  # fmt: skip
        numbers += more
    if not numbers or len(set(numbers)) != len(numbers):
        raise ValueError(f"--array {text} gives no number, or one twice; write each once, as 0-5")
    return numbers


def _environment(job: Job) -> list[str]:
    lines = []
    if job.modules:
        lines += ["# shellcheck source=/dev/null", "command -v module >/dev/null || . /etc/profile"]
        lines.append(f"module load {shlex.join(job.modules)}")
    if job.setup:
        lines += ["set +u # activation scripts rarely bear it", *job.setup, "set -u"]
    lines.append(f"export PIPELINE_SLURM={job.launcher} OMP_NUM_THREADS={job.threads}")
    if job.cpus_per_task:
        lines.append('export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun does not take it from sbatch any more')
    network = network_variables(job.interface, job.infiniband)
    if network:
        lines.append("export " + " ".join(f"{name}={shlex.quote(value)}" for name, value in network.items()))
    if job.made:  # a container's tool mounts no directory that is not there
        made = shlex.join(map(str, job.made))
        lines.append(f'srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 mkdir -p -- {made}')
    return lines


def _draw(job: Job) -> str:
    """Before the start of all ranks, in a run of a sweep, the question for its parameters."""
    one = _inside(job, "srun --nodes=1 --ntasks=1 --ntasks-per-node=1")
    lines = [
        "# A run of a sweep: the first start asks for its parameters, a later one finds them. 4: there are no more.",
        "# shellcheck disable=SC2054",
        "draw=(", *(f"  {line}" for line in one), f'  {_words(job.python)} -m pipeline launch --draw "$run"', ")",
        'start "${draw[@]}"',
        'if [[ $code == 4 ]]; then', '  say "the sweep is over: nothing was started"', "  exit 0", "fi",
    ]  # fmt: skip
    return "\n".join(lines) + "\n\n"


def network_variables(interface: str, infiniband: str) -> dict[str, str]:
    """What the config's choice of a network is called in the environment of NCCL and gloo."""
    named = {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface} if interface else {}
    if infiniband == "off":
        return named | {"NCCL_IB_DISABLE": "1"}
    return named | ({"NCCL_IB_HCA": infiniband} if infiniband else {})


def _check(job: Job, timeout: float = 0.0) -> str:
    """The start of the doctor on every rank. It ends by itself long before the time after which it is ended."""
    verb = f"doctor --nodes --timeout={timeout:g}" if timeout else "doctor --nodes"
    parts = {"check": _lines(_task(job, verb, wait=WAIT_SECONDS + int(timeout))),
             "seconds": str(CHECK_SECONDS + int(timeout))}  # fmt: skip
    return _filled(_template("check.sh"), parts) + "\n"


def _lines(lines: list[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)


def _task(job: Job, verb: str, wait: int = 0) -> list[str]:
    """The command that starts every rank, a line for each of its parts, as elements of an array of bash.

    wait: 0 = a rank that fails ends the others; else each ends by itself, or so many seconds after the first of them.
    """
    lines = _inside(job, f"srun --kill-on-bad-exit=0 --wait={wait}" if wait else "srun --kill-on-bad-exit=1")
    train = f'-m pipeline {verb} "$run/config.yaml"'
    if job.launcher == "srun":
        return [*lines, f"{_words(job.python)} {train}"]
    # The agent dies of a USR2 that it does not ignore; its workers, which inherit that, listen again by themselves.
    return [
        *lines,
        """bash -c 'trap "" USR2; exec "$0" -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"'""",
        f"{_words(job.python)} --nnodes={job.nodes} --nproc-per-node={job.devices}",
        '--master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT"',
        train,
    ]


def _inside(job: Job, srun: str) -> list[str]:
    """How srun starts something where the package is: on the nodes, or in a container on them."""
    lines = [srun]
    mounts = [*dict.fromkeys(f"{place}:{place}" for place in job.places), *job.mounts]
    if job.container == "pyxis":
        lines += [_words(f"--container-image={job.image}"),
                  _words(f"--container-mounts={','.join(_both_sides(mount) for mount in mounts)}"),
                  _words(f"--container-workdir={job.directory}")]  # fmt: skip
    if job.container == "apptainer":
        lines.append("apptainer exec" + (" --nv" if job.gpus_per_node else ""))
        lines += [_words("--bind", mount) for mount in mounts]
        lines.append(_words("--pwd", str(job.directory), job.image))
    return lines


def _both_sides(mount: str) -> str:
    return mount if ":" in mount else f"{mount}:{mount}"  # pyxis wants a target


def _words(*words: str) -> str:
    return shlex.join(words)


def _header_word(option: str) -> str:
    """An option as one word of an #SBATCH line, whose quotes know a backslash."""
    if _PLAIN.fullmatch(option):
        return option
    escaped = option.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
