"""What one rank holds of the weights and of the optimizer's moments, as ranges of tensors that are named by parameter.

A checkpoint is written and read through the same list: saving copies out of the views, restoring copies into them. Every backend shards
a tensor into contiguous ranges of its row-major order (FSDP2 by rows, ZeRO-3 by elements, ZeRO-1/2 wherever a flat partition
ends), so a range is all that another backend or another number of ranks needs to know. Nothing here is collective.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.backend.wrap import is_dtensor

WEIGHT = "weight"
ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")
BITSANDBYTES_MOMENTS = ("state1", "state2", "absmax1", "absmax2")

Named = Iterable[tuple[str, Any]]
"""(name in the unwrapped model, parameter), trainable ones only."""


@dataclass(frozen=True)
class Piece:
    """A contiguous range, in row-major order, of one tensor."""

    kind: str
    """`weight`, or the optimizer's name of a moment, such as `exp_avg`."""
    name: str
    """The parameter's name in the unwrapped model."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    """Position of the first element in the flattened whole tensor."""
    values: Tensor
    """The live storage, of any shape: writing to it changes the training state."""

    @property
    def key(self) -> str:
        """kind/name."""
        return f"{self.kind}/{self.name}"


def whole_pieces(named: Named, optimizer: torch.optim.Optimizer) -> Iterator[Piece]:
    """single, ddp: all of every tensor. fsdp: the rows of this rank's shards, of which there may be none."""
    for name, parameter in named:
        for kind, tensor in with_moments(parameter, optimizer):
            start, local = local_rows(tensor)
            yield Piece(kind, name, tuple(tensor.shape), start, local)


def fragment_pieces(named: Named, zero: Any) -> Iterator[Piece]:
    """ZeRO-1/2: what lies of each parameter in this rank's flat fp32 partition of its group."""
    for name, parameter in named:
        fragment = parameter._hp_mapping
        if fragment is None:
            continue
        flat = zero.single_partition_of_fp32_groups[fragment.param_group_index]
        inside = fragment.hp_fragment_address
        for kind, tensor in with_moments(flat, zero.optimizer):
            values = tensor.narrow(0, inside.start, inside.numel)
            yield Piece(kind, name, tuple(parameter.shape), fragment.lp_fragment_address.start, values)


def partition_pieces(named: Named, zero: Any, rank: int) -> Iterator[Piece]:
    """ZeRO-3: this rank's equal part of every parameter, without the padding at the end of the last part."""
    for name, parameter in named:
        group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
        start = rank * length
        inside = max(min(length, parameter.ds_numel - start), 0)
        for kind, tensor in with_moments(zero.fp32_partitioned_groups_flat[group], zero.optimizer):
            yield Piece(kind, name, tuple(parameter.ds_shape), start, tensor.narrow(0, offset, inside))


def with_moments(parameter: Tensor, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """The weight itself and its moments; those that do not exist before the first step are made, as zeros."""
    if hasattr(optimizer, "init_state"):
        return [(WEIGHT, parameter.detach()), *bitsandbytes_moments(parameter, optimizer)]
    state = optimizer.state[parameter]
    for kind in ADAMW_MOMENTS:
        if kind not in state:
            state[kind] = torch.zeros_like(parameter.detach())
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return [(WEIGHT, parameter.detach()), *((kind, state[kind]) for kind in ADAMW_MOMENTS)]


def bitsandbytes_moments(parameter: Tensor, optimizer: Any) -> list[tuple[str, Tensor]]:
    """8-bit moments and the scale of each of their blocks, or fp32 moments where a parameter is small or the optimizer only paged."""
    state = optimizer.state[parameter]
    if not state:
        for number, group in enumerate(optimizer.param_groups):
            for place, member in enumerate(group["params"]):
                if member is parameter:
                    optimizer.init_state(group, parameter, number, place)
    return [(kind, state[kind]) for kind in BITSANDBYTES_MOMENTS if kind in state]


def local_rows(tensor: Any) -> tuple[int, Tensor]:
    """Where this rank's rows start in the flattened whole tensor, and the rows; a tensor that is no shard: 0 and itself."""
    if not is_dtensor(tensor):
        return 0, tensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = tensor.to_local()
    return offset[0] * (tensor.numel() // max(tensor.shape[0], 1)), local


def read_steps(optimizer: torch.optim.Optimizer) -> int:
    """How many steps AdamW has taken; 0 before the first. A parameter that a loss does not reach takes none, so the most count."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)


def read_own_steps(optimizer: torch.optim.Optimizer, named: Named) -> dict[str, int]:
    """Of the parameters that have taken fewer steps, by name. Empty under ZeRO, whose partitions take every step."""
    states = {name: optimizer.state[parameter] for name, parameter in named if parameter in optimizer.state}
    own = {name: int(state["step"]) for name, state in states.items() if "step" in state}
    most = max(own.values(), default=0)
    return {name: steps for name, steps in own.items() if steps != most}


def write_steps(optimizer: torch.optim.Optimizer, named: Named, most: int, own: Mapping[str, int]) -> None:
    """Set AdamW's step counts, on which its bias correction depends: `most`, but of some parameters their own."""
    names = {parameter: name for name, parameter in named}
    for parameter, state in optimizer.state.items():
        steps = own.get(names.get(parameter, ""), most)
        if isinstance(state["step"], Tensor):
            state["step"].fill_(float(steps))
        else:
            state["step"] = steps  # bitsandbytes
