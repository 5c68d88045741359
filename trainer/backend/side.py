"""Talk between ranks beside training: small objects, over a gloo group of its own, from any one thread.

Checkpoints are agreed on here while training's own collectives run, and on GPUs no stream has to wait. Made at start-up by all ranks.
"""

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class SideGroup:
    """All ranks, over a process group that nothing else uses. Every method is collective; one thread at a time."""

    def __init__(self, rank: int, world_size: int) -> None:
        """Collective."""
        self.rank, self.world_size = rank, world_size
        self.group: Any = dist.new_group(backend="gloo") if world_size > 1 else None

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]
