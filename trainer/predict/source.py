"""A model that people name for prediction: what a run exported, or a model source with the task that it is to do."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from trainer.config import ModelConfig, Target
from trainer.errors import ConfigError
from trainer.model.adapters import find_adapter
from trainer.model.architecture import (
    AUTO_MODELS,
    LOADING_ERRORS,
    PROBLEM_TYPES,
    check_task,
    load_architecture,
    load_tokenizer,
    model_location,
    source_error,
)
from trainer.model.export import load_exported
from trainer.model.load import listing, load_weights
from trainer.run_folder import find_exported, read_info

Opened = tuple[nn.Module, PreTrainedTokenizerBase, dict[str, Any]]


def task_of(folder: Path) -> str:
    """The task of an exported model."""
    return str(read_info(folder).get("task", "classification"))


def task_of_adapter(path: Path) -> str:
    """The task of an exported adapter. CheckpointError for what is none."""
    return str(find_adapter(path)[1].get("task", "classification"))


def open_run(path: Path) -> Opened:
    """(model on the CPU, tokenizer, samestep.json) of a run directory or what was exported from one."""
    return load_exported(find_exported(path, None))


def open_source(source: str, task: str) -> Opened:
    """(model on the CPU, tokenizer, its labels where it has some, with their target) of asset:NAME, a folder or a hub id.

    ConfigError for a task that it cannot do, or whose head its weights lack: drawn at random it would answer nonsense.
    """
    if task not in AUTO_MODELS:
        raise ConfigError(f"--task ({task}): must be one of {', '.join(AUTO_MODELS)}")
    model = ModelConfig(source=source, task=task)
    names, target = labels_of(model)
    architecture = load_architecture(model, names, target=target)
    check_task(model, architecture)
    loaded, new_names = load_weights(model, architecture)
    if new_names:
        raise ConfigError(
            f"--task ({task}): the weights of {source} lack {listing(new_names)}, and would answer at random; train it first, or give "
            "a model that was trained for this"
        )
    tokenizer = load_tokenizer(model)
    longest = min(tokenizer.model_max_length, 512)
    info = {"label_names": names, "max_length": longest, "target": target} if names else {}
    return loaded.eval(), tokenizer, info


def labels_of(model: ModelConfig) -> tuple[list[str], Target]:
    """Names of the classes that a source was trained for, and whether one of them holds, several, or its one output is a number.

    No names for tasks without. ConfigError for a source that gives several numbers.
    """
    if model.task not in ("classification", "token_classification"):
        return [], "single"
    try:
        architecture = AutoConfig.from_pretrained(model_location(model.source))
    except LOADING_ERRORS as error:
        raise source_error(model, "configuration", error) from None
    names = [str(name) for _, name in sorted(architecture.id2label.items())]
    if model.task == "token_classification":
        return names, "single"
    if architecture.problem_type == PROBLEM_TYPES["multi"]:
        return names, "multi"
    if len(names) == 1:  # as transformers takes one label whose problem_type is not said
        return names, "regression"
    if architecture.problem_type == PROBLEM_TYPES["regression"]:
        raise ConfigError(
            f"--task (classification): {model.source} gives {len(names)} numbers, and predict shows one; call it with transformers"
        )
    return names, "single"
