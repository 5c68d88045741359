"""A config as text: the stored YAML, `--print-config` and a recipe's `--help`."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from trainer.config import RunConfig
from trainer.resolve.build import Resolved
from trainer.resolve.fields import Fields, fields_of
from trainer.resolve.values import FALSE_WORDS, NONE_WORDS, TRUE_WORDS, describe

_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./@+-]*(:[A-Za-z0-9_./@+-]+)*")


def config_to_yaml(config: RunConfig) -> str:
    """The whole config as YAML; `load_config` reads it back exactly, and --config takes it too."""
    return "".join(f"{line}\n" for _, line in _yaml_lines(config))


def config_with_sources(resolved: Resolved) -> str:
    """The whole config as YAML, with where each value comes from in an aligned comment."""
    lines = list(_yaml_lines(resolved.config))
    width = min(max(len(line) for _, line in lines), 60)
    return "\n".join(
        f"{line:<{width}}  # {resolved.sources[name]}" if name in resolved.sources else line for name, line in lines
    )


def help_text(main: Callable[[RunConfig], None], defaults: RunConfig) -> str:
    """A recipe's `--help`: its docstring, how settings are written, and every setting with type, value and meaning."""
    fields = fields_of(type(defaults))
    documentation = sys.modules[main.__module__].__doc__ or main.__doc__ or ""
    settings = "\n".join(f"  {line}" for line in _setting_lines(defaults, fields))
    return f"{documentation.strip()}\n\n{_USAGE}\n\nsettings, with this recipe's values:\n{settings}"


_USAGE = """usage: accelerate launch [launcher options] RECIPE [--config FILE.yaml]... [section.key=value]...

  --config FILE.yaml   settings from a file; may be repeated, later files win, arguments win over files
  --print-config       print the resolved settings and where each comes from, and exit
  --check              check settings, data and model names without training, and exit (0: fine, 2: mistakes)
  --help               print this and exit"""


def _yaml_lines(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(dotted name, YAML line) of every section and setting."""
    yield from _section_lines(config, "", "")


def _section_lines(section: BaseModel, prefix: str, indent: str) -> Iterator[tuple[str, str]]:
    for key in type(section).model_fields:
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            yield f"{prefix}{key}", f"{indent}{key}:"
            yield from _section_lines(value, f"{prefix}{key}.", f"{indent}  ")
        else:
            yield f"{prefix}{key}", f"{indent}{key}: {_yaml_value(value)}"


def _yaml_value(value: Any) -> str:
    """One value in YAML that both our reader and any other YAML reader understand the same way."""
    if isinstance(value, tuple):
        return f"[{', '.join(_yaml_value(item) for item in value)}]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return _yaml_float(value)
    return _yaml_text(str(value)) if isinstance(value, str | Path) else str(value)


def _yaml_float(value: float) -> str:
    """The shortest text of a float; `1.0e-08` instead of `1e-08`, which YAML 1.1 readers take for text."""
    text = repr(value)
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}.0e{exponent}" if e and "." not in mantissa else text


def _yaml_text(text: str) -> str:
    if _PLAIN.fullmatch(text) and text.lower() not in (*NONE_WORDS, *TRUE_WORDS, *FALSE_WORDS, "y", "n"):
        return text
    quoted: str = yaml.safe_dump(text, default_style='"', width=2**31, allow_unicode=True)
    return quoted.rstrip("\n")


def _setting_lines(defaults: RunConfig, fields: Fields) -> Iterator[str]:
    for name, leaf in fields.leaves.items():
        for option, field in leaf.variants.items():
            owner = f" [{leaf.choice}={option}]" if option else ""
            value, is_set = _value_at(defaults, name, option, leaf.choice)
            shown = _yaml_value(value) if is_set else _default_text(field.default)
            yield f"{name}{owner} = {shown}  ({describe(field.annotation)})"
            yield f"      {' '.join((field.description or '').split())}"


def _value_at(defaults: RunConfig, name: str, option: str | None, choice: str | None) -> tuple[Any, bool]:
    """The recipe's value of a setting; (None, False) where it is under another option or an absent section."""
    value: Any = defaults
    parts = name.split(".")
    for depth, part in enumerate(parts):
        if choice == ".".join(parts[:depth]) and option != getattr(value, "name", option):
            return None, False
        if not isinstance(value, BaseModel) or part not in type(value).model_fields:
            return None, False
        value = getattr(value, part)
    return value, True


def _default_text(default: Any) -> str:
    return "(must be set)" if repr(default) == "PydanticUndefined" else _yaml_value(default)
