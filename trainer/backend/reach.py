"""Which trained weights each backward pass reached: where passes or ranks differ in that, most backends make wrong gradients in silence.

Measured with experts that some passes did not go through (tests/distributed/test_reach.py; torch 2.13, DeepSpeed 0.19): FSDP2 reduces the
gradients of a group by their order, and adds those of different weights; ZeRO-1/2 leave out what one rank did not reach, ZeRO-3 what the
last pass of a step did not; DDP waits for every gradient, and says so only after a step with some not reduced. A weight that no pass of
any rank reaches, such as XLNet's mask_emb in classification, is left alone everywhere but on DDP, which needs to look for it, and under
ZeRO, whose optimizer steps a whole partition and so applies the weight decay to it too.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainer.errors import BackendError


class Reach:
    """Counts the backward passes of one step on this rank, and for each trained weight those that reached it."""

    def __init__(self, backend: str, world_size: int, names: Sequence[str]) -> None:
        self.backend, self.world_size, self.names = backend, world_size, names
        self.num_passes = 0
        self.counts = [0] * len(names)
        self.usual: list[bool] | None = None
        """Which weights every pass of the first step reached."""

    def watch(self, position: int, parameter: Tensor) -> None:
        """Count for the weight at this position whenever a gradient of `parameter` has been added."""

        def count(_: Tensor) -> None:
            self.counts[position] += 1

        parameter.register_post_accumulate_grad_hook(count)

    def check(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """BackendError where the passes of this step have made a wrong gradient; else begin to count anew.

        Collective in the first step, where it raises on all ranks; later a rank compares its own passes with those of its first step.
        """
        never, unlike = self.end_step(sum_over_ranks)
        if unlike:
            raise BackendError(
                f"{len(unlike)} trained weights, such as {unlike[0]}, have a part in the loss of some forward passes and none in that of "
                f"others, of which {self.backend} makes a wrong gradient; train on one process, or on ddp with "
                "train.ddp_find_unused_parameters=true"
            )
        if never and self.backend == "ddp":
            raise BackendError(
                f"{len(never)} trained weights, such as {never[0]}, have no part in the loss, and ddp waits for the gradient of each; "
                "set train.ddp_find_unused_parameters=true, which lets it look for such weights in every step"
            )

    def end_step(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> tuple[list[str], list[str]]:
        """The weights that no pass of this step reached, and those that only some passes did."""
        reached = [count == self.num_passes for count in self.counts]
        partly = [0 < count < self.num_passes for count in self.counts]
        self.num_passes, self.counts = 0, [0] * len(self.names)
        if self.usual is None:
            self.usual = reached
            totals, parts = sum_over_ranks(torch.tensor([reached, partly], dtype=torch.int64)).tolist()
            unlike = [part > 0 or 0 < total < self.world_size for total, part in zip(totals, parts, strict=True)]
        else:
            unlike = [part or now != usual for part, now, usual in zip(partly, reached, self.usual, strict=True)]
        never = [not (now or other) for now, other in zip(reached, unlike, strict=True)]
        return self._named(never), self._named(unlike)

    def _named(self, chosen: Sequence[bool]) -> list[str]:
        return [name for name, is_chosen in zip(self.names, chosen, strict=True) if is_chosen]
