"""The linear layers that a method adapts, by the names people use for them: `query`, `attention.output.dense`, `all-linear`.

A leaf below methods.py. Invariant: PEFT gets whole layer names, so that what is adapted is exactly what `resolve_targets` says.
"""

import difflib
from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer.backend.wrap import repeated_blocks
from trainer.errors import ConfigError
from trainer.model.heads import encoder_of, encoder_prefix, head_modules


def resolve_targets(model: nn.Module, targets: Sequence[str] | str, *, setting: str = "method.targets") -> list[str]:
    """Whole names of the linear layers to adapt, in the model's order. ConfigError that lists them all where one is unknown.

    A target names the last dotted parts: `dense` is every dense layer of the encoder, `attention.output.dense` only attention's.
    `all-linear`: every linear layer of the repeated blocks, without pooler and head.
    """
    if targets == "all-linear" or tuple(targets) == ("all-linear",):
        inside = {id(module) for block in repeated_blocks(encoder_of(model)) for module in block.modules()}
        return [name for name in encoder_linears(model) if id(model.get_submodule(name)) in inside]
    known = encoder_linears(model)
    unknown = [target for target in targets if not any(matches(name, target) for name in known)]
    if unknown:
        raise ConfigError(
            *(
                f"{setting} ({target}) is no linear layer of the encoder; {suggestion(target, known)}"
                for target in unknown
            )
        )
    return [name for name in known if any(matches(name, target) for target in targets)]


def encoder_linears(model: nn.Module) -> list[str]:
    """Whole names of all linear layers outside the head: nn.Linear and GPT-2's Conv1D."""
    prefix, heads = encoder_prefix(model), head_modules(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return [name for name in linears if name.startswith(prefix) and name.split(".")[0] not in heads]


def matches(name: str, target: str) -> bool:
    """Whether `target` is the last dotted parts of `name`."""
    return name == target or name.endswith("." + target)


def suggestion(target: str, known: Sequence[str]) -> str:
    """What could have been meant, and what there is."""
    names = short_names(known)
    close = difflib.get_close_matches(target, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}It has: {', '.join(names)}; or all-linear"


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
