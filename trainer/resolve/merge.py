"""Layers -> one flat table of values: recipe defaults < --config files < the command line.

Values are read by the type of their field here. Unknown keys, unreadable values and keys of a method that is not in
force are collected as problems; nothing is raised.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from pydantic import BaseModel

from trainer.resolve.fields import Choice, Fields
from trainer.resolve.layers import Setting
from trainer.resolve.suggest import accelerate_rule, did_you_mean, nearest_word
from trainer.resolve.values import NONE_WORDS, Text, UnreadableError, describe, read_value, show_value


@dataclass
class Merged:
    """The layers put on top of each other."""

    values: dict[str, Any]
    """Dotted name -> value; a whole section that is none stands under its own name."""
    origins: dict[str, Setting] = field(default_factory=dict)
    """Dotted name -> the setting that won; absent where the recipe or the default decides."""
    in_force: dict[str, str | None] = field(default_factory=dict)
    """Choice -> option."""
    problems: list[str] = field(default_factory=list)
    bad_names: set[str] = field(default_factory=set)
    """Names with a problem already, so that no second message follows from the first."""

    def nested(self) -> dict[str, Any]:
        """The values as the nested dictionary that pydantic validates."""
        return _nested(self.values)

    def nested_without(self, names: Set[str], base: Mapping[str, Any]) -> dict[str, Any]:
        """The same with the recipe's values, or the defaults, under these names."""
        kept = {name: value for name, value in self.values.items() if name not in names}
        return _nested(kept | {name: base[name] for name in names if name in base})

    def reject(self, setting: Setting, rule: str) -> None:
        """Note a problem with a setting."""
        self.problems.append(setting.problem(rule))
        self.bad_names.add(setting.key)


def flat_values(config: BaseModel | None, fields: Fields) -> dict[str, Any]:
    """Dotted name -> value of every setting of a config; a section that is none stands under its own name."""
    if config is None:
        return {}
    values = {}
    for name in [*fields.leaves, *(name for name, optional in fields.sections.items() if optional)]:
        value, found = _look_up(config, name)
        if found and not isinstance(value, BaseModel):
            values[name] = value
    return values


def set_by(config: BaseModel, fields: Fields) -> set[str]:
    """Names that were written when the config was built (by a recipe), as opposed to defaults of the config classes."""
    tags = {choice.tag_name: name for name, choice in fields.choices.items()}
    return {name for name in fields.leaves if _is_set(config, tags.get(name, name))}


def merge(fields: Fields, base: Mapping[str, Any], settings: Sequence[Setting]) -> Merged:
    """Lay settings, in the order of their layers, over the values of the recipe."""
    merged = Merged(dict(base))
    by_layer = sorted((_spelled_out(setting, fields) for setting in settings), key=lambda setting: setting.layer)
    history = {name: _history(choice, base, by_layer, merged) for name, choice in fields.choices.items()}
    for name, choice in fields.choices.items():
        merged.in_force[name] = history[name][-1][1]
        if merged.in_force[name] != base.get(choice.tag_name, choice.default) or choice.tag_name not in base:
            _start_afresh(merged, choice)
    for setting in by_layer:
        _apply(setting, fields, merged, history)
    return merged


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        place = root
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return root


History = list[tuple[int, str | None]]
"""The option of a choice from a layer on, in order: [(0, "full"), (2, "lora")]."""


def _spelled_out(setting: Setting, fields: Fields) -> Setting:
    """`method=lora` -> `method.name=lora`."""
    if setting.key in fields.choices and setting.raw is not None:
        return replace(setting, key=fields.choices[setting.key].tag_name)
    return setting


def _history(choice: Choice, base: Mapping[str, Any], settings: Sequence[Setting], merged: Merged) -> History:
    history: History = [(0, base.get(choice.tag_name, choice.default))]
    for setting in settings:
        if setting.key != choice.tag_name:
            continue
        text = setting.raw.text if isinstance(setting.raw, Text) else ""
        if text in choice.options:
            history.append((setting.layer, text))
            continue
        near = nearest_word(text, choice.options)
        merged.reject(
            setting,
            f"must be one of {', '.join(choice.options)}; "
            + (f"did you mean {choice.tag_name}={near}?" if near else f"set {choice.tag_name} to one of these"),
        )
        merged.bad_names.add(choice.name)
    return history


def _start_afresh(merged: Merged, choice: Choice) -> None:
    """Another option than the recipe's: its values start from its own defaults."""
    merged.values = {name: value for name, value in merged.values.items() if not name.startswith(f"{choice.name}.")}
    merged.values[choice.tag_name] = merged.in_force[choice.name]


def _apply(setting: Setting, fields: Fields, merged: Merged, history: Mapping[str, History]) -> None:
    key = setting.key
    if any(key == choice.tag_name for choice in fields.choices.values()):
        merged.origins[key] = setting  # its value is in force already
        return
    if fields.sections.get(key) and isinstance(setting.raw, Text) and setting.raw.text.lower() in NONE_WORDS:
        _drop_section(setting, merged)
    elif key not in fields.leaves:
        merged.reject(setting, _unknown(setting, fields))
    elif _meant_for_option_in_force(setting, fields, merged, history):
        _read(setting, fields, merged)


def _drop_section(setting: Setting, merged: Merged) -> None:
    merged.values = {name: value for name, value in merged.values.items() if not name.startswith(f"{setting.key}.")}
    merged.values[setting.key] = None
    merged.origins[setting.key] = setting


def _meant_for_option_in_force(
    setting: Setting, fields: Fields, merged: Merged, history: Mapping[str, History]
) -> bool:
    """Whether a setting applies. A key of another option is a problem, unless a later layer switched away from it."""
    leaf = fields.leaves[setting.key]
    if leaf.choice is None:
        return True
    final = merged.in_force[leaf.choice]
    at_its_layer = [option for layer, option in history[leaf.choice] if layer <= setting.layer][-1]
    if final in leaf.variants:
        return at_its_layer == final or at_its_layer not in leaf.variants
    if at_its_layer not in leaf.variants and leaf.choice not in merged.bad_names:
        owners = [str(option) for option in leaf.variants]
        tag = fields.choices[leaf.choice].tag_name
        merged.reject(
            setting,
            f"belongs to {' or '.join([', '.join(owners[:-1]), owners[-1]] if owners[1:] else owners)}, and {tag} is {final}; "
            f"set {tag}={owners[0]} or leave out {setting.key}",
        )
    return False


def _read(setting: Setting, fields: Fields, merged: Merged) -> None:
    leaf = fields.leaves[setting.key]
    annotation = (fields.variant(setting.key, merged.in_force) or next(iter(leaf.variants.values()))).annotation
    try:
        if setting.raw is None:
            raise UnreadableError(f"must be {describe(annotation)}")
        value = read_value(annotation, setting.raw)
    except UnreadableError as error:
        merged.reject(setting, f"{error}; {_value_fix(setting, annotation, merged)}")
        return
    section = setting.key.rpartition(".")[0]
    merged.values.pop(section, None)
    merged.values[setting.key] = value
    merged.origins[setting.key] = setting


def _value_fix(setting: Setting, annotation: Any, merged: Merged) -> str:
    """What to write instead of a value that does not fit."""
    options = [str(word) for word in get_args(annotation) if isinstance(word, str)]
    near = nearest_word(setting.raw.text, options) if isinstance(setting.raw, Text) and options else None
    if near:
        return f"did you mean {setting.key}={near}?"
    if merged.values.get(setting.key) is not None:
        return f"the recipe has {show_value(merged.values[setting.key])}"
    return f"correct it or leave out {setting.key}"


def _unknown(setting: Setting, fields: Fields) -> str:
    """Rule and fix for a key that is no setting."""
    key = setting.key
    if key in fields.sections:
        inside = [name for name in fields.leaves if name.startswith(f"{key}.")]
        return f"is a section, not a setting; set one of {', '.join(inside[:4])}{', ...' if len(inside) > 4 else ''}"
    if key.endswith("<<"):
        return "YAML merge keys are not read; write the settings out"
    rule = accelerate_rule(key)
    near = did_you_mean(key, fields.leaves)
    if rule:
        return rule
    if near:
        return f"unknown setting; did you mean {' or '.join(f'`{name}`' for name in near)}?"
    return "unknown setting; `python RECIPE --help` lists all of them"


def _look_up(config: BaseModel, name: str) -> tuple[Any, bool]:
    """The value at a dotted name, and whether the config has such a field."""
    value: Any = config
    for part in name.split("."):
        if not isinstance(value, BaseModel) or part not in type(value).model_fields:
            return None, False
        value = getattr(value, part)
    return value, True


def _is_set(config: BaseModel, name: str) -> bool:
    value: Any = config
    for part in name.split("."):
        if not isinstance(value, BaseModel) or part not in value.model_fields_set:
            return False
        value = getattr(value, part)
    return True
