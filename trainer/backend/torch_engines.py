"""The verbs of one step where the wrapper is torch's own or none: single, DDP and FSDP2."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from trainer.backend.engine import Engine
from trainer.backend.pieces import Piece


class PlainEngine(Engine):
    """single and ddp."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """As in Engine; DDP reduces in the last backward pass alone."""
        return nullcontext() if last or self.backend == "single" else self.model.no_sync()

    @property
    def watches_reach(self) -> bool:
        """As in Engine; DDP may look for itself."""
        return self.backend == "ddp" and not self.model.find_unused_parameters


class FsdpEngine(Engine):
    """FSDP2: parameters, gradients and moments are DTensors, sharded over all ranks."""

    def weights(self, *, trainable_only: bool) -> Iterator[tuple[str, Tensor]]:
        """As in Engine, from shards: a forward pass leaves some groups whole, and `state_dict` (export, rank 0 alone) would shard
        them on that rank only, so that the ranks' next gathers would no longer match."""
        self._reshard()
        yield from super().weights(trainable_only=trainable_only)

    def local_state(self) -> list[Piece]:
        """As in Engine; a group that a forward pass left whole holds no shards, so all are sharded first."""
        self._reshard()
        return super().local_state()

    def _reshard(self) -> None:
        for module in self._sharded_modules():
            module.reshard()

    def _sharded_modules(self) -> list[Any]:
        from torch.distributed.fsdp import FSDPModule

        return [module for module in self.model.modules() if isinstance(module, FSDPModule)]

    def _watch_reach(self) -> None:
        """Note the position of each trained weight by the id of its shard: what backward passes reach is made in a forward pass."""
        self.unwatched = {id(parameter): position for position, (_, parameter) in enumerate(self._trainable())}

    def _backward(self, loss: Tensor) -> None:
        if self.unwatched:
            self._watch_whole_weights()
        super()._backward(loss)

    def _watch_whole_weights(self) -> None:
        """Watch those that were made since; each stays the same object from then on (torch 2.13, FSDPParam.init_unsharded_param)."""
        groups = (group for module in self._sharded_modules() for group in module._get_fsdp_state()._fsdp_param_groups)
        for held in (held for group in groups for held in group.fsdp_params):
            position = self.unwatched.get(id(held.sharded_param))
            if position is not None and hasattr(held, "_unsharded_param"):
                self.reach.watch(position, held._unsharded_param)
                del self.unwatched[id(held.sharded_param)]
