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
        """World of RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and GROUP_RANK; alone without them."""
        number = {name: int(environment.get(name, default)) for name, default in _DEFAULTS.items()}
        return World(*number.values())

    @property
    def leads(self) -> bool:
        """Whether this process writes what the run writes once."""
        return self.rank == 0

    @staticmethod
    def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
        """Whether a launcher has started this process as one of several."""
        return "RANK" in environment


_DEFAULTS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0"}
