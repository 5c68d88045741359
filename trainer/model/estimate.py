"""What each method would train on a model: parameters, file, memory. From the architecture alone: no weights, no memory.

`samestep methods` prints it. The estimate of memory is weights, gradients and AdamW's moments; activations depend on the batch.
"""

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn

from trainer.config import LowRank, MethodConfig, ModelConfig, QloraConfig, RunConfig
from trainer.errors import ConfigError
from trainer.model.architecture import load_architecture, meta_model
from trainer.model.export import shared_factors
from trainer.model.methods import METHODS, apply_method, check_layers
from trainer.model.targets import resolve_targets

FP32, GRADIENT_AND_MOMENTS = 4, 12  # bytes a parameter
CHECKPOINTED = 12
"""Bytes of a checkpoint for each trainable parameter: weight and two moments."""
QUANTIZED = {"nf4": 4.127 / 8, "fp4": 4.127 / 8, "int8": 1.0}  # bytes a weight; 4 bits with doubly quantized scales


@dataclass(frozen=True)
class Estimate:
    """One method on one model."""

    method: str
    trainable: int
    share: float
    """Of the model's parameters."""
    share_of_matrices: float | None
    """Adapter parameters over those of the matrices that it adapts, for LoRA and its relatives."""
    file_bytes: int
    """Of what a run exports."""
    training_bytes: float
    """Weights, gradients and moments; without activations."""


def estimate_methods(
    model: ModelConfig, *, rank: int | None = None, targets: tuple[str, ...] | None = None
) -> tuple[list[Estimate], dict[str, str]]:
    """Every method at its usual settings, and why the others do not work on this model.

    rank and targets replace those of the methods that have them. ConfigError for a model that does not load, or where they do not fit it.
    """
    layers = meta_model(model, load_architecture(model, ("0", "1")))
    for method in usual_methods(rank=rank, targets=targets):
        if isinstance(method, LowRank) and (rank is not None or targets is not None):
            check_layers(layers, method)
    found: list[Estimate] = []
    refused: dict[str, str] = {}
    for method in usual_methods(rank=rank, targets=targets):
        try:
            found.append(estimate(model, method))
        except ConfigError as error:
            refused[method.name] = error.problems[0]
    return found, refused


def usual_methods(*, rank: int | None, targets: tuple[str, ...] | None) -> list[MethodConfig]:
    """The settings of each method, in the order of the table."""
    kinds = {kind.model_fields["name"].default: kind for kind in get_args(RunConfig.model_fields["method"].annotation)}
    made = []
    for name in METHODS:
        changes: dict[str, Any] = {}
        if issubclass(kinds[name], LowRank):
            changes = {"rank": rank, "targets": targets}
        made.append(kinds[name](**{key: value for key, value in changes.items() if value is not None}))
    return made


def estimate(model: ModelConfig, method: MethodConfig) -> Estimate:
    """Apply the method on the meta device and count."""
    row = METHODS[method.name]
    if model.task not in row.tasks:
        raise ConfigError(f"trains {row.words}, which task {model.task} has not")
    layers = meta_model(model, load_architecture(model, ("0", "1")))
    check_layers(layers, method)
    total = sum(parameter.numel() for parameter in layers.parameters())
    matrices = elements_of(layers, method.targets) if isinstance(method, LowRank) else 0
    base_bytes = weight_bytes(total, elements_of(layers, "all-linear"), method)
    with torch.device("meta"):
        adapted = apply_method(layers, method, task=model.task)
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    trainable = sum(parameter.numel() for parameter in trained.values())
    added = sum(parameter.numel() for name, parameter in trained.items() if "lora_" in name)
    return Estimate(
        method=method.name,
        trainable=trainable,
        share=trainable / total,
        share_of_matrices=added / matrices if matrices else None,
        file_bytes=FP32 * (exported_elements(adapted, trained) if row.is_adapter else total),
        training_bytes=base_bytes + GRADIENT_AND_MOMENTS * trainable + (FP32 * trainable if row.is_adapter else 0),
    )


def elements_of(layers: nn.Module, targets: tuple[str, ...] | str) -> int:
    """Weights of the linear layers that `targets` names."""
    return sum(layers.get_parameter(f"{name}.weight").numel() for name in resolve_targets(layers, targets))


def weight_bytes(total: int, quantized: int, method: MethodConfig) -> float:
    """Of the base in memory."""
    if not isinstance(method, QloraConfig):
        return FP32 * total
    return FP32 * (total - quantized) + QUANTIZED[method.quantize] * quantized


def exported_elements(adapted: nn.Module, trained: dict[str, nn.Parameter]) -> int:
    """Elements of an exported adapter: of a network that makes prompts only the prompts."""
    settings = getattr(adapted, "peft_config", {}).get("default")
    if settings is None or not settings.is_prompt_learning:
        fixed = shared_factors(adapted) if settings is not None else {}
        return sum(tensor.numel() for tensor in (*trained.values(), *fixed.values()))
    rest = sum(p.numel() for name, p in trained.items() if not name.startswith("prompt_encoder."))
    layers = 2 * settings.num_layers if settings.peft_type == "PREFIX_TUNING" else 1
    return rest + int(settings.num_virtual_tokens * settings.token_dim * layers)
