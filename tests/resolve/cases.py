"""A tiny recipe's defaults and the ways to resolve them, for the tests of this folder."""

from pathlib import Path
from typing import Any

import pytest

from trainer.config import FullConfig, LoraConfig, OptimConfig, RunConfig, TrainConfig
from trainer.errors import ConfigError
from trainer.resolve import Resolved, resolve

DEFAULTS = RunConfig(
    name="tiny",
    method=LoraConfig(rank=4, targets=("query", "value")),
    optim=OptimConfig(peak_lr=1e-3),
    train=TrainConfig(num_epochs=2, global_batch_size=8),
)
FULL = DEFAULTS.model_copy(update={"method": FullConfig()})


def resolved(*argv: str, defaults: RunConfig = DEFAULTS) -> Resolved:
    return resolve(RunConfig, defaults, argv)


def value_of(argument: str) -> Any:
    value: Any = resolved(argument).config
    for part in argument.partition("=")[0].split("."):
        value = getattr(value, part)
    return value


def problems_of(*argv: str, defaults: RunConfig = DEFAULTS) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        resolved(*argv, defaults=defaults)
    return caught.value.problems


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)
