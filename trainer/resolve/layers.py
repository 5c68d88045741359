"""Where settings come from: YAML files and `section.key=value` arguments, both as one list of Setting.

Nothing is interpreted here: values stay text until trainer/resolve/values.py reads them by the field's type.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import yaml

from trainer.resolve.fields import Fields
from trainer.resolve.suggest import accelerate_rule, nearest_word
from trainer.resolve.values import Raw, UnreadableError, raw_from_argument, raw_from_node, show_raw

T = TypeVar("T")
COMMAND_LINE = "command line"
FLAGS = ("--print-config", "--check", "--help", "-h")


@dataclass(frozen=True)
class Setting:
    """One `key: value` as somebody wrote it."""

    key: str
    raw: Raw | None
    """None: the value is a mapping or a list with more than plain values in it, which fits no field."""
    source: str
    """The YAML file as given, or `command line`."""
    line: int | None
    layer: int
    """Later layers win: 1, 2, ... for the --config files, the last one for the command line."""

    @property
    def where(self) -> str:
        """For messages: "in configs/x.yaml line 4", "on the command line"."""
        return f"in {self.source} line {self.line}" if self.line else "on the command line"

    @property
    def shown(self) -> str:
        """The value for messages."""
        return "nested values" if self.raw is None else show_raw(self.raw)

    def problem(self, rule: str) -> str:
        """A message about this setting: `key (value) where: rule; fix`."""
        return f"{self.key} ({self.shown}) {self.where}: {rule}"


@dataclass
class Arguments:
    """The command line of a recipe, taken apart."""

    config_files: list[Path] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def split_arguments(argv: Sequence[str]) -> Arguments:
    """Sort arguments into --config files, `key=value` overrides and flags."""
    result = Arguments()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in FLAGS:
            result.flags.add("--help" if word == "-h" else word)
        elif word == "--config":
            _take_config(rest, result)
        elif word.startswith("--config="):
            result.config_files.append(Path(word.removeprefix("--config=")))
        elif word.startswith("-"):
            result.problems.append(_unknown_option(word, rest))
        else:
            result.overrides.append(word)
    return result


def settings_from_overrides(overrides: Sequence[str], layer: int, problems: list[str]) -> list[Setting]:
    """The `key=value` arguments; a key given twice with different values is a problem."""
    settings: dict[str, Setting] = {}
    for word in overrides:
        key, equals, value = word.partition("=")
        key = key.strip()
        if not equals or not key:
            problems.append(
                f"{word} on the command line: a setting is written section.key=value; write {key or 'KEY'}=VALUE"
            )
            continue
        setting = Setting(key, _raw_or_none(raw_from_argument, value), COMMAND_LINE, None, layer)
        if key in settings and settings[key].raw != setting.raw:
            problems.append(
                setting.problem(f"is set twice: {settings[key].shown} and {setting.shown}; keep one of the two")
            )
        settings[key] = setting
    return list(settings.values())


def settings_from_file(path: Path, fields: Fields, layer: int, problems: list[str]) -> list[Setting]:
    """The settings of a YAML file, with their lines; an unreadable file is one problem."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = (error.problem_mark or error.context_mark).line + 1  # type: ignore[union-attr]
        problems.append(f"--config ({path}) line {line}: not valid YAML: {error.problem}; correct this line")
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(_unreadable_file(path, error))
    else:
        return _settings_of_root(root, path, fields, layer, problems)
    return []


def _settings_of_root(
    root: yaml.Node | None, path: Path, fields: Fields, layer: int, problems: list[str]
) -> list[Setting]:
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        problems.append(f"--config ({path}): must hold a mapping of settings, such as `optim: {{peak_lr: 1e-4}}`")
        return []
    settings: dict[str, Setting] = {}
    for key, line, node in _flatten(root, "", fields):
        setting = Setting(key, _raw_or_none(raw_from_node, node), str(path), line, layer)
        if key in settings:
            problems.append(setting.problem(f"is set twice, first in line {settings[key].line}; keep one of the two"))
        settings[key] = setting
    return list(settings.values())


def _flatten(mapping: yaml.MappingNode, prefix: str, fields: Fields) -> Iterator[tuple[str, int, yaml.Node]]:
    """Dotted key, line and value of every setting. Descends into known sections only, so an alias loop ends too."""
    for key_node, node in mapping.value:
        key = prefix + (key_node.value if isinstance(key_node, yaml.ScalarNode) else "?")
        if isinstance(node, yaml.MappingNode) and key in fields.sections:
            yield from _flatten(node, f"{key}.", fields)
        elif not (_is_empty(node) and key in fields.sections):
            yield key, key_node.start_mark.line + 1, node


def _is_empty(node: yaml.Node) -> bool:
    """A section without anything under it, as in `optim:`."""
    return isinstance(node, yaml.ScalarNode) and node.value == "" and node.style is None


def _raw_or_none(read: Callable[[T], Raw], written: T) -> Raw | None:
    try:
        return read(written)
    except UnreadableError:
        return None


def _unreadable_file(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        near = nearest_word(path.name, [other.name for other in path.parent.glob("*.y*ml")])
        fix = f"did you mean {path.parent / near}?" if near else "give the path of a YAML file"
        return f"--config ({path}): there is no such file; {fix}"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else f"it is not YAML text ({error})"
    return f"--config ({path}): cannot be read: {reason}; give the path of a YAML file"


def _take_config(rest: list[str], result: Arguments) -> None:
    if rest and not rest[0].startswith("-"):
        result.config_files.append(Path(rest.pop(0)))
    else:
        result.problems.append("--config on the command line: needs a file; write --config FILE.yaml")


def _unknown_option(word: str, rest: list[str]) -> str:
    """A message for `--key value`, `--key=value` or a misplaced flag of the launcher; takes the value off `rest`."""
    key, equals, value = word.lstrip("-").partition("=")
    if not equals and rest and "=" not in rest[0] and not rest[0].startswith("-"):
        value = rest.pop(0)
    rule = accelerate_rule(key.replace("-", "_"))
    if rule:
        return f"{word.partition('=')[0]} ({value}) on the command line: {rule}"
    return (
        f"{word.partition('=')[0]} ({value}) on the command line: unknown option; "
        f"a setting is written without dashes: {key}={value or 'VALUE'}"
    )
