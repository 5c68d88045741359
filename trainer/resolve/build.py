"""Arguments -> a checked config, or one ConfigError with every problem there is."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.config import RunConfig, check_world
from trainer.errors import ConfigError
from trainer.resolve.checks import without_effect
from trainer.resolve.fields import Fields, fields_of
from trainer.resolve.layers import (
    Setting,
    settings_from_file,
    settings_from_overrides,
    split_arguments,
)
from trainer.resolve.merge import Merged, flat_values, merge, set_by
from trainer.resolve.rules import fields_refused, problems_of


@dataclass(frozen=True)
class Resolved:
    """A config and where each of its values comes from."""

    config: RunConfig
    sources: Mapping[str, str]
    """Dotted name -> `default`, `recipe`, a YAML file as it was given, or `command line`."""


@dataclass(frozen=True)
class Attempt:
    """What resolving came to: all problems, and a config."""

    resolved: Resolved | None
    """With problems: what is left without the wrong settings, good only for finding more problems."""
    problems: tuple[str, ...]


def resolve(model_type: type[RunConfig], defaults: RunConfig, argv: Sequence[str]) -> Resolved:
    """The config of a run from `--config FILE` and `section.key=value` arguments; flags are left to the caller.

    Raises ConfigError with all problems, including a global batch smaller than WORLD_SIZE of the environment.
    """
    attempt = read_arguments(model_type, defaults, argv)
    if attempt.problems or attempt.resolved is None:
        raise ConfigError(*attempt.problems)
    return attempt.resolved


def read_arguments(model_type: type[RunConfig], defaults: RunConfig, argv: Sequence[str]) -> Attempt:
    """Like `resolve`, for a caller that adds problems of its own before it reports: nothing is raised."""
    arguments = split_arguments(argv)
    attempt = try_resolve(model_type, defaults, arguments.config_files, arguments.overrides, world_size_here())
    return replace(attempt, problems=(*arguments.problems, *attempt.problems))


def try_resolve(
    model_type: type[RunConfig],
    defaults: RunConfig,
    config_files: Sequence[Path],
    overrides: Sequence[str],
    world_size: int = 1,
) -> Attempt:
    """Like `resolve`, for callers that add problems of their own before they report: nothing is raised."""
    fields = fields_of(model_type)
    problems: list[str] = []
    settings: list[Setting] = []
    for layer, path in enumerate(config_files, start=1):
        settings += settings_from_file(path, fields, layer, problems)
    settings += settings_from_overrides(overrides, len(config_files) + 1, problems)
    base = flat_values(defaults, fields)
    merged = merge(fields, base, settings)
    problems += merged.problems
    config = _validate(model_type, fields, merged, base, problems)
    if config is None:
        return Attempt(None, tuple(problems))
    problems += without_effect(config, merged, _usual_values(fields, merged, base)) + check_world(config, world_size)
    return Attempt(Resolved(config, _sources(config, defaults, fields, merged)), tuple(problems))


def load_config(path: Path, model_type: type[RunConfig] = RunConfig) -> RunConfig:
    """The config that `config_to_yaml` wrote to `path`, exactly."""
    fields = fields_of(model_type)
    problems: list[str] = []
    settings = settings_from_file(path, fields, 1, problems)
    merged = merge(fields, {}, settings)
    problems += merged.problems
    config = _validate(model_type, fields, merged, {}, problems) if not problems else None
    if problems or config is None:
        raise ConfigError(*problems)
    return config


def world_size_here() -> int:
    """The number of processes the launcher started: WORLD_SIZE, 1 without a launcher."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdecimal() else 1


def _validate(
    model_type: type[RunConfig], fields: Fields, merged: Merged, base: Mapping[str, Any], problems: list[str]
) -> RunConfig | None:
    """The config, and pydantic's complaints added to `problems`.

    With complaints it is the config without the refused values, for further checks only; None where there is none.
    """
    try:
        return model_type.model_validate(merged.nested())
    except ValidationError as refusal:
        error = refusal
        problems += problems_of(error, fields, merged, base)
    try:
        return model_type.model_validate(merged.nested_without(fields_refused(error, fields), base))
    except ValidationError:
        return None


def _usual_values(fields: Fields, merged: Merged, base: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The recipe's value and the default of each setting."""
    variants = {name: fields.variant(name, merged.in_force) for name in fields.leaves}
    return {name: (base.get(name), field.default) for name, field in variants.items() if field is not None}


def _sources(config: RunConfig, defaults: RunConfig, fields: Fields, merged: Merged) -> dict[str, str]:
    written = set_by(defaults, fields)
    recipe_values = flat_values(defaults, fields)
    sources = {}
    for name in flat_values(config, fields):
        if name in merged.origins:
            sources[name] = merged.origins[name].source
        else:
            same = name in merged.values and name in recipe_values
            sources[name] = "recipe" if name in written and same else "default"
    return sources
