"""Which modules of a `*ForSequenceClassification` model are its head, read from its structure and not from a table of names.

A leaf: methods, optimizer groups and the summary ask here. Invariant: head and encoder together are the whole model.
"""

from typing import Any, cast

from torch import nn

HEADED_TASKS = ("classification", "token_classification", "question_answering")
"""Values of model.task whose head is new for every run, so that every method trains it."""


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """Names of the head's modules: what holds weights beside the encoder, such as `classifier` or `pre_classifier`.

    BERT's pooler is part of the encoder: checkpoints ship it trained. Works on a PEFT model too, with the base model's names.
    """
    whole = without_adapter(model)
    encoder = encoder_of(whole)
    if encoder is whole:  # T5 holds its stacks itself
        embeddings = cast(Any, whole).get_output_embeddings()
        return tuple(name for name, child in whole.named_children() if child is embeddings)
    return tuple(
        name for name, child in whole.named_children() if child is not encoder and any(True for _ in child.parameters())
    )


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The head's parameters; of a PEFT model also the frozen originals of modules that PEFT trains as a copy."""
    whole = without_adapter(model)
    return [parameter for name in head_modules(model) for parameter in whole.get_submodule(name).parameters()]


def encoder_of(model: nn.Module) -> nn.Module:
    """The model below the head, such as BertModel; of T5, which has none, the model itself."""
    return cast(nn.Module, without_adapter(model).base_model)


def encoder_name(model: nn.Module) -> str:
    """The encoder's name in the model, such as `bert`."""
    return str(cast(Any, without_adapter(model)).base_model_prefix)


def encoder_prefix(model: nn.Module) -> str:
    """What the names of the encoder's parameters start with, such as `bert.`; nothing where the encoder is the model itself."""
    return "" if encoder_of(model) is without_adapter(model) else encoder_name(model) + "."


def without_adapter(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model; any other model itself."""
    inner = getattr(model, "get_base_model", None)
    return cast(nn.Module, inner()) if inner is not None else model
