"""AdamW: its parameter groups and its learning rate, which is a pure function of the step.

The loop sets each group's rate to lr_at(step) * lr_factor before every step; there is no scheduler object, so no backend and no
number of processes can step one too often. Local to the rank: no collective.
"""

import math
from typing import Any, Literal, cast

import torch
from torch import nn

from trainer.backend.wrap import block_stacks
from trainer.config import RunConfig, TrainConfig
from trainer.model.heads import encoder_of, head_parameters, without_adapter
from trainer.model.methods import METHODS

BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}
"""optim.name -> the class; on parameters of less than 4,096 elements all keep their moments in fp32."""


def lr_at(
    step: int,
    *,
    total_steps: int,
    peak: float,
    schedule: Literal["linear", "cosine", "constant"],
    warmup_fraction: float,
    min_lr_fraction: float,
) -> float:
    """Learning rate of the optimizer step about to be taken, 0-based.

    Rises by peak / warmup_steps per step from the first step on, is `peak` in the last step of the warmup (without one: in the
    first step), and ends at min_lr_fraction * peak in the last step. transformers' schedules are one step behind: their step 0
    has rate 0, and their value at step + 1 is ours at step.
    """
    warmup_steps = math.ceil(total_steps * warmup_fraction - 1e-9)  # 0.1 * 30 is a little more than 3
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    peak_step = max(warmup_steps - 1, 0)
    progress = (step - peak_step) / max(total_steps - 1 - peak_step, 1)
    return peak * (min_lr_fraction + (1.0 - min_lr_fraction) * shape_at(min(progress, 1.0), schedule))


def count_steps(train: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    if train.max_steps is not None:
        return train.max_steps
    assert train.num_epochs is not None, "TrainConfig checks that one of them is set"
    return max(math.ceil(train.num_epochs * steps_per_epoch - 1e-9), 1)  # 1.1 * 100 is a little more than 110


def lr_of_step(step: int, total_steps: int, config: RunConfig) -> float:
    """The learning rate of 0-based `step` of a run: a pure function of the config, whatever the number of processes."""
    optim = config.optim
    return lr_at(
        step,
        total_steps=total_steps,
        peak=peak_lr(config),
        schedule=optim.schedule,
        warmup_fraction=optim.warmup_fraction,
        min_lr_fraction=optim.min_lr_fraction,
    )


def shape_at(progress: float, schedule: str) -> float:
    """Share of the way down that is left: 1 at progress 0; 0 at progress 1, but for `constant`."""
    if schedule == "constant":
        return 1.0
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def peak_lr(config: RunConfig) -> float:
    """The highest learning rate of everything but the head: as set, or the method's common default."""
    return config.optim.peak_lr if config.optim.peak_lr is not None else METHODS[config.method.name].peak_lr


def build_optimizer(model: nn.Module, config: RunConfig, *, fused: bool) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; `fused`: torch's one kernel for all of them, on CUDA and on CPU."""
    groups = parameter_groups(model, config)
    if config.optim.name != "adamw":
        from bitsandbytes import optim

        kind = getattr(optim, BITSANDBYTES[config.optim.name])
        return cast(
            torch.optim.Optimizer, kind(groups, lr=peak_lr(config), betas=config.optim.betas, eps=config.optim.eps)
        )
    return torch.optim.AdamW(groups, lr=peak_lr(config), betas=config.optim.betas, eps=config.optim.eps, fused=fused)


def parameter_groups(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """Trainable parameters grouped by (decay, rate), in the model's order, each parameter once.

    Each group: params, names, weight_decay, lr_factor (its peak relative to peak_lr), lr. Call before the backend wraps the model.
    """
    undecayed, factors = parameters_without_decay(model), lr_factors(model, config)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if id(parameter) in undecayed else config.optim.weight_decay
        factor = factors.get(id(parameter), 1.0)  # virtual tokens belong to no layer
        group = groups.setdefault(
            (decay, factor),
            {"params": [], "names": [], "weight_decay": decay, "lr_factor": factor, "lr": peak_lr(config) * factor},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def parameters_without_decay(model: nn.Module) -> set[int]:
    """Ids of biases and other vectors, of embeddings, of all weights of normalization layers, and of IA3's factors, which rest at 1."""
    found = set()
    for path, module in model.named_modules():
        whole = isinstance(module, nn.Embedding) or "Norm" in type(module).__name__ or path.endswith(".ia3_l")
        for name, parameter in module.named_parameters(recurse=False):
            if whole or name.endswith("bias") or parameter.dim() < 2:
                found.add(id(parameter))
    return found


def lr_factors(model: nn.Module, config: RunConfig) -> dict[int, float]:
    """Peak rate of each parameter, by id, relative to peak_lr: layer decay by depth, and the head's own rate."""
    head_lr = config.optim.head_lr
    head_factor = 1.0 if head_lr is None else head_lr / peak_lr(config)
    head = {id(parameter) for parameter in head_parameters(model)}
    depths = layer_depths(model)
    top = max(depths.values())
    return {
        key: head_factor if key in head else config.optim.layer_decay ** (top - depth) for key, depth in depths.items()
    }


def layer_depths(model: nn.Module) -> dict[int, int]:
    """Depth of each parameter, by id: 0 for embeddings, i + 1 for block i, one more for pooler, last norm and head.

    Encoder and decoder each count from their own top, since every block of the decoder reads what the encoder's top says.
    """
    stacks = block_stacks(encoder_of(model))
    top = max(map(len, stacks), default=0)
    of_block = {
        id(parameter): top - len(stack) + position + 1
        for stack in stacks
        for position, block in enumerate(stack)
        for parameter in block.parameters()
    }
    depths: dict[int, int] = {}
    before_blocks = bool(stacks)
    for name, parameter in without_adapter(model).named_parameters():
        if id(parameter) in of_block:
            before_blocks = False
        is_below = before_blocks or (
            len(stacks) > 1 and "embed" in name
        )  # a decoder's stand behind the encoder's blocks
        depths[id(parameter)] = of_block.get(id(parameter), 0 if is_below else top + 1)
    return depths
