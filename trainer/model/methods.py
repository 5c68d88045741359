"""Which weights a method trains: full, head, lora. `apply_method` before anything wraps the model, `check_method` before anything loads.

LoRA goes through PEFT, which gets whole layer names, so that what is adapted is exactly what `resolve_targets` says.
"""

import difflib
import warnings
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trainer.backend.wrap import repeated_blocks
from trainer.config import HeadConfig, LoraConfig, MethodConfig, ModelConfig, RunConfig
from trainer.errors import ConfigError
from trainer.model.architecture import load_architecture, meta_model
from trainer.model.heads import encoder_name, encoder_of, head_modules

PEFT_TASKS = {"classification": "SEQ_CLS", "clm": "CAUSAL_LM"}
"""model.task -> PEFT's name of it."""


def apply_method(
    model: nn.Module, method: MethodConfig, *, new_modules: Sequence[str] = (), task: str = "classification"
) -> nn.Module:
    """The model with `requires_grad` set as the method says; for lora wrapped by PEFT.

    new_modules: modules outside the head whose weights were not in the checkpoint, such as a missing pooler. head and lora
    train them too: random and frozen they would be lost with the process. New weights come from torch's global generator.
    """
    if isinstance(method, LoraConfig):
        return add_lora(model, method, new_modules, task)
    if isinstance(method, HeadConfig):
        model.requires_grad_(False)
        for name in (*head_modules(model), *new_modules):
            model.get_submodule(name).requires_grad_(True)
    return model


def add_lora(model: nn.Module, method: LoraConfig, new_modules: Sequence[str], task: str) -> nn.Module:
    """The PEFT model. A classification head is a trained copy; the rest of the base is frozen."""
    import peft

    targets = resolve_targets(model, method.targets)
    heads = head_modules(model) if task == "classification" else ()
    settings = peft.LoraConfig(
        task_type=PEFT_TASKS[task],
        r=method.rank,
        lora_alpha=cast(int, method.alpha),
        lora_dropout=method.dropout,
        target_modules=targets,
        modules_to_save=[*heads, *new_modules] or None,
        fan_in_fan_out=all(isinstance(model.get_submodule(name), Conv1D) for name in targets),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # PEFT corrects it per layer where kinds are mixed
        adapted = peft.get_peft_model(cast(peft.PeftModel, model), settings)
    scale_the_small_side(adapted)
    return cast(nn.Module, adapted)


def scale_the_small_side(adapted: nn.Module) -> None:
    """Multiply by alpha / rank after the first factor, which has `rank` columns, and not after the second, which has all of the layer's.

    The same product; it saves a pass over every layer's output, and one in the backward pass: 4 % of a step on a CPU.
    """
    from peft.tuners.lora.layer import Linear, LoraVariant

    class ScaledSmallSide(LoraVariant):
        """PEFT's own forward with the factors in another order."""

        @staticmethod
        def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
            first, second = module.lora_A[active_adapter], module.lora_B[active_adapter]
            return result + second(first(module.lora_dropout[active_adapter](x)) * module.scaling[active_adapter])

    for layer in adapted.modules():
        if type(layer) is Linear and not layer.lora_variant:
            layer.lora_variant |= dict.fromkeys(layer.lora_A, ScaledSmallSide())


def check_method(config: RunConfig) -> None:
    """ConfigError for a LoRA target that does not exist or is too small, from the architecture alone: no weights, no memory."""
    if not isinstance(config.method, LoraConfig):
        return
    if config.model.init == "random":
        raise ConfigError(
            "method.name (lora) needs pretrained weights: an adapter is stored without its base, and the random base of "
            "model.init=random would be lost; use method.name=full"
        )
    check_targets(config.model, config.method)


def check_targets(model: ModelConfig, method: LoraConfig) -> None:
    """Build the layers on the meta device and resolve the targets there."""
    layers = meta_model(model, load_architecture(model, ("0", "1")))
    targets = resolve_targets(layers, method.targets)
    smallest = min(targets, key=lambda name: min(layers.get_parameter(f"{name}.weight").shape))
    shape = tuple(layers.get_parameter(f"{smallest}.weight").shape)
    if method.rank > min(shape):
        raise ConfigError(
            f"method.rank ({method.rank}) must be at most {min(shape)}, the smaller side of {smallest} {shape}; lower it"
        )


def resolve_targets(model: nn.Module, targets: Sequence[str] | str) -> list[str]:
    """Whole names of the linear layers to adapt, in the model's order. ConfigError that lists them all where one is unknown.

    A target names the last dotted parts: `dense` is every dense layer of the encoder, `attention.output.dense` only attention's.
    `all-linear`: every linear layer of the repeated blocks, without pooler and head.
    """
    if targets == "all-linear":
        inside = {id(module) for block in repeated_blocks(encoder_of(model)) for module in block.modules()}
        return [name for name in encoder_linears(model) if id(model.get_submodule(name)) in inside]
    known = encoder_linears(model)
    unknown = [target for target in targets if not any(matches(name, target) for name in known)]
    if unknown:
        raise ConfigError(*(unknown_target(target, known) for target in unknown))
    return [name for name in known if any(matches(name, target) for target in targets)]


def encoder_linears(model: nn.Module) -> list[str]:
    """Whole names of all linear layers outside the head: nn.Linear and GPT-2's Conv1D."""
    prefix = encoder_name(model) + "."
    kinds = (nn.Linear, Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and name.startswith(prefix)]


def matches(name: str, target: str) -> bool:
    """Whether `target` is the last dotted parts of `name`."""
    return name == target or name.endswith("." + target)


def unknown_target(target: str, known: Sequence[str]) -> str:
    """The message that lists what could have been meant."""
    names = short_names(known)
    close = difflib.get_close_matches(target, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return (
        f"method.targets ({target}) is no linear layer of the encoder; {hint}It has: {', '.join(names)}; or all-linear"
    )


def short_names(known: Sequence[str]) -> list[str]:
    """For each layer the shortest last part that tells its kind: numbers of blocks left out, enough parts to be unambiguous."""
    kinds = list(dict.fromkeys(kind_of(name) for name in known))
    return [next(s for s in suffixes(kind) if sum(matches(k, s) for k in kinds) == 1 or s == kind) for kind in kinds]


def kind_of(name: str) -> str:
    """The parts of a layer's name behind its block's number: `attention.self.query` of `bert.encoder.layer.3.attention.self.query`."""
    parts = name.split(".")
    numbers = [position for position, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)


def suffixes(name: str) -> list[str]:
    """`query`, `self.query`, `attention.self.query`, ...: shortest first."""
    parts = name.split(".")
    return [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
