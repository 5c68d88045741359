"""The verbs of one step under DeepSpeed. `accelerator.backward` would also step and clip; here each is a call of its own.

DeepSpeed keeps fp32 weights and moments in flat partitions of its own; the model's parameters are copies that forward reads.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.backend.engine import Engine
from trainer.backend.pieces import Piece, fragment_pieces, partition_pieces, with_moments
from trainer.backend.request import Request


class ZeroEngine(Engine):
    """DeepSpeed ZeRO-1/2/3."""

    def __init__(
        self, request: Request, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        super().__init__(request, accelerator, model, optimizer)
        if self.precision == "fp16":
            self.model.optimizer.torch_autocast_gradscaler = (
                None  # it would clip the scaled gradient; ours takes its place
            )
            self.model.optimizer.override_loss_scale(self.loss_scale)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """As in Engine; tells DeepSpeed now whether the coming backward pass completes the gradient."""
        self.model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        """As in Engine; DeepSpeed multiplies by the loss scale itself."""
        self.model.backward(loss * self.divides_by, scale_wrt_gas=False)

    def _grad_norm(self) -> float:
        """As in Engine, by DeepSpeed's own sums, as it clips by them; inf where any part is not finite."""
        zero = self.model.optimizer
        if self.backend == "zero3":
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = float(combine_grad_norm_groups(zero._get_norm_groups()))
        else:
            norm = float(zero.scaled_global_norm())
        return norm / self.loss_scale if norm >= 0 else math.inf  # DeepSpeed's -1 stands for a norm that is not finite

    def step(self, grad_norm: float, max_grad_norm: float | None) -> None:
        """As in Engine; DeepSpeed takes the norm once more itself, over the same gradient."""
        self.heartbeat.beat("optimizer step")
        self.model.optimizer.clip_grad = max_grad_norm or 0.0
        self.model.step()
        self._grow_loss_scale()
        self._tell_loss_scale()

    def discard(self) -> None:
        """As in Engine. DeepSpeed's step cleans up after a norm that is not finite and moves nothing; here it is made to see one."""
        zero = self.model.optimizer
        if zero.offload_optimizer if self.backend == "zero3" else zero.cpu_offload:
            # The gradients already lie in host memory, and their norms were taken on the way.
            zero.norm_for_param_grads = dict.fromkeys(zero.norm_for_param_grads, torch.tensor(math.nan))
        else:
            for gradient in chain.from_iterable(gradients or () for gradients in zero.averaged_gradients.values()):
                gradient.fill_(math.nan)
        self.model.step()
        self._shrink_loss_scale()
        self._tell_loss_scale()

    def local_state(self) -> list[Piece]:
        """As in Engine: ranges of DeepSpeed's flat fp32 partitions."""
        zero = self.model.optimizer
        is_3 = self.backend == "zero3"
        for flat in zero.fp32_partitioned_groups_flat if is_3 else zero.single_partition_of_fp32_groups:
            with_moments(flat, zero.optimizer)  # those that hold only padding on this rank take steps too
        if is_3:
            return list(partition_pieces(self._trainable(), zero, self.rank))
        return list(fragment_pieces(self._trainable(), zero))

    def state_was_written(self, optimizer_steps: int, own_steps: Mapping[str, int]) -> None:
        """As in Engine. The fp32 partitions were written; the weights that forward reads follow, as at the end of a step."""
        super().state_was_written(optimizer_steps, own_steps)
        zero = self.model.optimizer
        if self.backend != "zero3":
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def restore_loss_scale(self, scale: float | None, good_steps: int) -> None:
        """As in Engine, and tells DeepSpeed."""
        super().restore_loss_scale(scale, good_steps)
        self._tell_loss_scale()

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return self.model.optimizer.optimizer

    def _tell_loss_scale(self) -> None:
        if self.precision == "fp16":
            self.model.optimizer.override_loss_scale(self.loss_scale)

    def _whole_weight(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        if parameter.requires_grad:
            return safe_get_full_fp32_param(parameter).detach()
        with GatheredParameters([parameter], enabled=self.backend == "zero3"):
            return parameter.detach().clone()

    def _whole_gradient(self, parameter: Any) -> Tensor:
        if self.backend == "zero3":
            from deepspeed.utils import safe_get_full_grad

            return safe_get_full_grad(parameter)
        return parameter.get_full_hp_grad()  # safe_get_full_grad prefers .grad, which ZeRO-1 leaves unreduced
