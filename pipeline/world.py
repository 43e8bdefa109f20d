"""Where this process stands among all processes of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class World:
    """Place of one process, as launchers describe it in the environment (torchrun's names)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this node
    local_size: int = 1
    node: int = 0

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> World:
        """World of RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and GROUP_RANK; alone without them.

        Slurm's names count only where our job script says that srun starts the ranks: anything else that
        runs inside a job, a test or a shell, is alone.
        """
        if environment.get(SLURM) == "srun":
            return _of_step(environment)
        number = {name: int(environment.get(name, default)) for name, default in _DEFAULTS.items()}
        return World(*number.values())

    @property
    def leads(self) -> bool:
        """Whether this process writes what the run writes once."""
        return self.rank == 0

    @staticmethod
    def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
        """Whether a launcher has started this process as one of several."""
        return "RANK" in environment or environment.get(SLURM) == "srun"

    def environment(self) -> dict[str, str]:
        """The variables that say the same to a process and what it starts."""
        place = (self.rank, self.size, self.local_rank, self.local_size, self.node)
        return {name: str(number) for name, number in zip(_DEFAULTS, place, strict=True)}


TARGET = "PIPELINE_TARGET"  # set by what `launch` renders: the cluster.launcher whose container or node this is
NODE = "PIPELINE_NODE"  # set by what `launch` renders for several nodes: the number of this one, which starts its ranks
SLURM = "PIPELINE_SLURM"  # set by our job script alone: srun or torchrun, which of them starts the ranks
_DEFAULTS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0"}


def _of_step(environment: Mapping[str, str]) -> World:
    """World of a task of srun. The step counts, not the job: srun's own options may have asked for less."""
    node = int(environment["SLURM_NODEID"])
    return World(
        rank=int(environment["SLURM_PROCID"]),
        size=int(environment["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(environment["SLURM_LOCALID"]),
        local_size=_tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[node],
        node=node,
    )


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's short form: 2(x3),1 is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        tasks, _, times = part.partition("(x")
        counts += [int(tasks)] * int(times.rstrip(")") or 1)
    return counts
