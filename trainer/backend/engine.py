"""The verbs of one optimizer step, the same on every backend. The loop calls them in order and never asks which backend it is.

    for micro-batch: with engine.micro_batch(last=...): forward, backward
    grad_norm() -> step(...) or discard()

What each backend does to the gradient of the loss it is given, and so what `backward` multiplies by:

| backend | over ranks | over micro-batches | when it reduces |
|---|---|---|---|
| single | - | sums | - |
| ddp | divides the sum by the world size | sums | after the last micro-batch |
| fsdp | divides the sum by the world size | sums | after every micro-batch, so that no rank ever holds a whole gradient |
| zero1 | divides the sum by the world size | sums (scale_wrt_gas=False) | after the last micro-batch |
| zero2, zero3 | divides the sum by the world size | sums (scale_wrt_gas=False) | after every micro-batch |

Precision: weights, moments and gradient reduction are fp32; `forward` computes in bf16 or fp16 where asked. fp16 has a dynamic loss
scale of our own, equal on all ranks because it follows the global gradient norm.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.backend.heartbeat import Heartbeat
from trainer.backend.pieces import Piece, read_own_steps, read_steps, whole_pieces, write_steps
from trainer.backend.reach import Reach
from trainer.backend.request import Request
from trainer.backend.wrap import autocast, is_dtensor, strip_wrapper

INITIAL_LOSS_SCALE = 2.0**16  # fp16 only, as in torch.amp.GradScaler
LOSS_SCALE_GROWTH_EVERY = 2000  # good steps before the scale doubles


class NoRoomError(Exception):
    """A rank ran out of memory in work that every rank does alone; raised on all of them."""


class Engine:
    """Wrapped model and optimizer of one backend. Every rank calls every method that says "collective"."""

    def __init__(
        self, request: Request, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.backend, self.precision, self.world_size = request.backend, request.precision, request.world_size
        self.rank, self.device = accelerator.process_index, accelerator.device
        self.model: Any = model  # nn.Module, DistributedDataParallel, FSDPModule or DeepSpeedEngine
        self.optimizer = optimizer
        self.divides_by = 1 if self.backend == "single" else self.world_size
        self.loss_scale = INITIAL_LOSS_SCALE if self.precision == "fp16" else 1.0
        self.good_steps = 0
        self.heartbeat = Heartbeat()
        self.works_alone = False
        self.reach = Reach(self.backend, self.world_size, [name for name, _ in self._trainable()])
        if self.watches_reach:
            self._watch_reach()

    def describe(self) -> str:
        """Backend, processes, precision and device in words."""
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        precision = "fp32" if self.precision == "no" else f"{self.precision} over fp32 weights"
        return f"{self.backend}, {processes}, {precision}, {self.device.type}"

    def exactness(self, *, deterministic: bool) -> str:
        """How near a resumed run is to one that never ended, on the same backend and number of processes, in words."""
        if self.device.type == "cpu":
            return "bit for bit on this machine"
        if not deterministic:
            return "exact but for rounding: train.deterministic is off"
        kind = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return f"bit for bit on {kind}, as far as torch is deterministic"

    # One step

    def set_learning_rate(self, lr: float) -> None:
        """Set every group's rate to `lr` times the group's own factor."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Surrounds forward and backward of one micro-batch; `last` of this step."""
        return nullcontext()

    def forward(self, inputs: Mapping[str, Tensor]) -> Any:
        """The model's outputs, computed in the run's precision. Collective under fsdp and zero3."""
        self.heartbeat.beat("forward")
        with autocast(self.precision, self.device.type):
            return self.model(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the global loss; shares are summed over ranks. Collective."""
        self.heartbeat.beat("backward")
        self._backward(loss)
        self.reach.num_passes += 1

    def grad_norm(self) -> float:
        """L2 norm of the gradient of the global batch, before clipping; the same on all ranks; nan or inf where any part is. Collective.

        BackendError where this backend has added up wrong gradients, as some passes did not reach the weights that others did.
        """
        self.heartbeat.beat("gradient norm")
        if self.watches_reach:
            self.reach.check(self.sum_array_over_ranks)
        return self._grad_norm()

    def _backward(self, loss: Tensor) -> None:
        (loss * (self.divides_by * self.loss_scale)).backward()

    def _grad_norm(self) -> float:
        gradients = self._gradients()
        on_cpu = bool(gradients) and gradients[0].device.type == "cpu"  # also those that FSDP offloads
        norm = nn.utils.get_total_norm(row_norms(gradients) if on_cpu else gradients)
        return float(whole(norm)) / self.loss_scale

    def step(self, grad_norm: float, max_grad_norm: float | None) -> None:
        """Clip to `max_grad_norm`, move the weights, drop the gradients. Collective under zero."""
        self.heartbeat.beat("optimizer step")
        coefficient = clip_coefficient(grad_norm, max_grad_norm) / self.loss_scale
        if coefficient != 1.0:
            torch._foreach_mul_(self._gradients(), coefficient)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._grow_loss_scale()

    def discard(self) -> None:
        """Drop the gradients without a step; halves the fp16 loss scale. All ranks together."""
        self.optimizer.zero_grad(set_to_none=True)
        self._shrink_loss_scale()

    def pinned(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A CPU batch where a GPU can fetch it while this rank goes on; the same tensors on a CPU, or where they lie there. Any thread."""
        return {name: tensor.pin_memory() if self.device.type == "cuda" else tensor for name, tensor in batch.items()}

    def to_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy of a CPU batch on this rank's device; asynchronous on a GPU."""
        self.heartbeat.beat("batch to device")
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in self.pinned(batch).items()}

    @property
    def watches_reach(self) -> bool:
        """Whether every backward pass must reach the same weights, or their gradients would be wrong (trainer/backend/reach.py)."""
        return self.backend != "single"

    def _watch_reach(self) -> None:
        for position, (_, parameter) in enumerate(self._trainable()):
            self.reach.watch(position, parameter)

    # Over ranks

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Sums in float64. Collective: one all-reduce."""
        self.heartbeat.beat("sum over ranks")
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        self.heartbeat.beat("after a sum over ranks")
        return tensor.tolist()

    def sum_array_over_ranks(self, array: Tensor) -> Tensor:
        """Element-wise sum over ranks of a CPU tensor of the same shape everywhere. Collective."""
        if self.works_alone:
            self._agree_on_room(ran_out=False)
        self.heartbeat.beat("sum over ranks")
        if self.world_size == 1:
            return array
        tensor = array.to(self.device)
        dist.all_reduce(tensor)
        return tensor.cpu()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Surrounds forward passes that each rank makes by itself, and sums of arrays. NoRoomError on all ranks where one has no room.

        They agree before every such sum and at the end, for no rank may wait in a sum that another never reaches. Collective.
        """
        self.works_alone = True
        try:
            yield
            self._agree_on_room(ran_out=False)
        except torch.OutOfMemoryError:
            self._agree_on_room(ran_out=True)
        finally:
            self.works_alone = False

    def _agree_on_room(self, *, ran_out: bool) -> None:
        if self.sum_over_ranks([float(ran_out)])[0]:
            raise NoRoomError

    # Whole tensors

    @property
    def module(self) -> nn.Module:
        """The model without DDP's or DeepSpeed's wrapper. Under fsdp and zero3 its parameters are shards."""
        return getattr(self.model, "module", self.model) if self.backend != "single" else self.model

    def weights(self, *, trainable_only: bool) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 tensor) of each parameter, whole, one at a time. Collective; every rank gets the tensors."""
        for name, parameter in self._named_parameters():
            if parameter.requires_grad or not trainable_only:
                self.heartbeat.beat(f"gathering {name}")
                yield name, self._whole_weight(parameter)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 gradient of the global batch before clipping), whole, between the last backward and the step. Collective."""
        for name, parameter in self._trainable():
            yield name, self._whole_gradient(parameter) / self.loss_scale

    # What a checkpoint holds

    def local_state(self) -> list[Piece]:
        """What this rank holds of the trainable weights and their moments, as live views; missing moments are made, as zeros."""
        return list(whole_pieces(self._trainable(), self.optimizer))

    @property
    def settles_in_first_step(self) -> bool:
        """Whether a first backward pass must come before a resumed step, or the step would round otherwise than uninterrupted.

        DDP orders its buckets by the first backward pass; on three ranks and more, an element's place in its bucket decides in which order
        the ranks' gradients are added.
        """
        return self.backend == "ddp" and self.world_size > 2

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds all of the state, or a share of it."""
        return self.backend in ("single", "ddp")

    @property
    def optimizer_steps(self) -> int:
        """Steps that the optimizer has taken; skipped ones do not count."""
        return read_steps(self._torch_optimizer)

    @property
    def own_steps(self) -> dict[str, int]:
        """The same of weights that have taken fewer: some passes did not reach them, which single and ddp may permit."""
        return read_own_steps(self._torch_optimizer, self._trainable())

    def state_was_written(self, optimizer_steps: int, own_steps: Mapping[str, int]) -> None:
        """Call after writing to `local_state`: sets the optimizer's step counts and the copies of the weights. Collective under zero."""
        write_steps(self._torch_optimizer, self._trainable(), optimizer_steps, own_steps)

    def restore_loss_scale(self, scale: float | None, good_steps: int) -> None:
        """Take up fp16's dynamic scale; in another precision, or from one (None), it starts as it does in a new run."""
        if self.precision == "fp16" and scale is not None:
            self.loss_scale = scale
        self.good_steps = good_steps

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self._named_parameters() if parameter.requires_grad)

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((strip_wrapper(name), parameter) for name, parameter in self.model.named_parameters())

    def _whole_weight(self, parameter: nn.Parameter) -> Tensor:
        return whole(parameter.detach())

    def _whole_gradient(self, parameter: Any) -> Tensor:
        return whole(parameter.grad) if parameter.grad is not None else torch.zeros_like(whole(parameter.detach()))

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _grow_loss_scale(self) -> None:
        self.good_steps += 1
        if self.precision == "fp16" and self.good_steps % LOSS_SCALE_GROWTH_EVERY == 0:
            self.loss_scale *= 2.0

    def _shrink_loss_scale(self) -> None:
        self.good_steps = 0
        if self.precision == "fp16":
            self.loss_scale = max(self.loss_scale / 2.0, 1.0)


def whole(tensor: Any) -> Tensor:
    """The full tensor of a shard; any other tensor itself. Collective for shards."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def row_norms(tensors: list[Tensor]) -> list[Tensor]:
    """The norms of each tensor's rows, float64; together they have the tensors' norm, and the shards of a tensor the same as its whole.

    On a CPU torch adds a tensor's squares one after another in fp32 (pytorch#169237): 8 million of them are 2e-4 too small, and half
    a tensor's norm is off by less than its whole's, so that clipping would depend on the number of ranks. A GPU adds in a tree.
    """
    return [(torch.linalg.vector_norm(tensor, dim=-1) if tensor.dim() > 1 else tensor).double() for tensor in tensors]


def clip_coefficient(grad_norm: float, max_grad_norm: float | None) -> float:
    """What clipping multiplies the gradient by, with the 1e-6 that torch and DeepSpeed both use."""
    return 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (grad_norm + 1e-6))
