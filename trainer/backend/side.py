"""Talk between ranks beside training: small objects, over a gloo group of its own, from any one thread.

Checkpoints are agreed on here while training's own collectives run, and on GPUs no stream has to wait. Made at start-up by all ranks.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from trainer.errors import CheckpointError, SamestepError

T = TypeVar("T")
NEVER = timedelta(days=7)
"""The timeout of a process group whose ranks may wait for as long as others work; sockets know no time beyond 24 days."""


class SideGroup:
    """All ranks, over a process group that nothing else uses. Every method is collective; one thread at a time."""

    def __init__(self, rank: int, world_size: int) -> None:
        """Collective. A rank that has written its files waits here for the others, which the watchdog lets write while they get on."""
        self.rank, self.world_size = rank, world_size
        self.group: Any = dist.new_group(backend="gloo", timeout=NEVER) if world_size > 1 else None

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def on_rank_0(self, act: Callable[[], T]) -> T:
        """What rank 0's `act` returned, on every rank; an error of the user's or of the disk is raised on every rank."""
        found: tuple[Any, Exception | None] = (None, None)
        if self.rank == 0:
            try:
                found = (act(), None)
            except (SamestepError, OSError) as error:
                found = (None, error)
        value, failure = self.broadcast(found)
        if isinstance(failure, OSError):
            raise CheckpointError(f"{failure.filename}: {(failure.strerror or str(failure)).lower()}")
        if failure is not None:
            raise failure
        return value

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]
