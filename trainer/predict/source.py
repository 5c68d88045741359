"""A model that people name for prediction: what a run exported, or a model source with the task that it is to do."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from trainer.config import ModelConfig
from trainer.errors import ConfigError
from trainer.model.adapters import find_adapter
from trainer.model.architecture import (
    AUTO_MODELS,
    LOADING_ERRORS,
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
    """(model on the CPU, tokenizer, its labels where it has some) of asset:NAME, a folder or a hub id.

    ConfigError for a task that it cannot do, or whose head its weights lack: drawn at random it would answer nonsense.
    """
    if task not in AUTO_MODELS:
        raise ConfigError(f"--task ({task}): must be one of {', '.join(AUTO_MODELS)}")
    model = ModelConfig(source=source, task=task)
    names = label_names(model)
    architecture = load_architecture(model, names)
    check_task(model, architecture)
    loaded, new_names = load_weights(model, architecture)
    if new_names:
        raise ConfigError(
            f"--task ({task}): the weights of {source} lack {listing(new_names)}, and would answer at random; train it first, or give "
            "a model that was trained for this"
        )
    tokenizer = load_tokenizer(model)
    longest = min(tokenizer.model_max_length, 512)
    return loaded.eval(), tokenizer, {"label_names": names, "max_length": longest} if names else {}


def label_names(model: ModelConfig) -> list[str]:
    """Of the classes that a source was trained for; nothing for tasks without."""
    if model.task not in ("classification", "token_classification"):
        return []
    try:
        return [
            str(name) for _, name in sorted(AutoConfig.from_pretrained(model_location(model.source)).id2label.items())
        ]
    except LOADING_ERRORS as error:
        raise source_error(model, "configuration", error) from None
