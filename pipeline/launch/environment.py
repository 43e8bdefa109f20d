"""The run's processes as Lightning sees them: what our launcher said, and no detection."""

from __future__ import annotations

import os

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

from pipeline.world import World


class LaunchedEnvironment(ClusterEnvironment):
    """Ranks and rendezvous address from a World; processes were started by someone else."""

    def __init__(self, world: World):
        super().__init__()
        self.world = world

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        return int(os.environ.get("MASTER_PORT", "0"))

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.world.size

    def set_world_size(self, size: int) -> None:
        self._refuse("world size", size, self.world.size)

    def global_rank(self) -> int:
        return self.world.rank

    def set_global_rank(self, rank: int) -> None:
        self._refuse("rank", rank, self.world.rank)

    def local_rank(self) -> int:
        return self.world.local_rank

    def node_rank(self) -> int:
        return self.world.node

    def _refuse(self, what: str, asked: int, given: int) -> None:
        if asked != given:
            raise RuntimeError(f"Lightning counts a {what} of {asked}, but the launcher gave {given}")
