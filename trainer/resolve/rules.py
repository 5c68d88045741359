"""pydantic's complaints in our words: field (value) where: rule; fix."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from trainer.resolve.fields import Fields
from trainer.resolve.layers import Setting
from trainer.resolve.merge import Merged
from trainer.resolve.values import show_value

_RULES = {
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "string_pattern_mismatch": "must match {pattern}",
    "extra_forbidden": "unknown setting",
    "missing": "must be set",
}


def problems_of(error: ValidationError, fields: Fields, merged: Merged, base: Mapping[str, Any]) -> list[str]:
    """One message per field or section that pydantic refuses, without those that have a message already."""
    problems: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        name = _dotted_name(detail["loc"], fields)
        if name in merged.bad_names or name in problems:
            continue
        if name in fields.leaves:
            problems[name] = _field_problem(name, _rule(detail, fields), fields, merged, base)
        else:
            problems[name] = f"{name}: {_rule(detail, fields)}{_said_by(name, _rule(detail, fields), merged)}"
    return list(problems.values())


def fields_refused(error: ValidationError, fields: Fields) -> set[str]:
    """Names of the settings whose values pydantic refuses."""
    return {_dotted_name(detail["loc"], fields) for detail in error.errors(include_url=False)}


def _rule(detail: Any, fields: Fields) -> str:
    context = detail.get("ctx", {})
    if detail["type"] == "value_error":
        return str(context["error"])
    known = _RULES.get(detail["type"])
    message: str = detail["msg"]
    return known.format(**context) if known else message[:1].lower() + message[1:]


def _field_problem(name: str, rule: str, fields: Fields, merged: Merged, base: Mapping[str, Any]) -> str:
    setting: Setting | None = merged.origins.get(name)
    if setting is None:
        shown = f" ({show_value(merged.values[name])})" if name in merged.values else ""
        return f"{name}{shown}: {rule}; set {name}=VALUE"
    documentation = (
        fields.variant(name, merged.in_force) or next(iter(fields.leaves[name].variants.values()))
    ).description
    fix = f"the recipe has {show_value(base[name])}" if base.get(name) is not None else f"{documentation}"
    return setting.problem(f"{rule}; {fix}")


def _said_by(section: str, rule: str, merged: Merged) -> str:
    """Where the settings that a section's rule talks about were made."""
    prefix = f"{section}." if section else ""
    named = [
        f"{name} is set {setting.where}"
        for name, setting in merged.origins.items()
        if name.startswith(prefix) and name.removeprefix(prefix) in rule
    ]
    return f" ({', '.join(named)})" if named else ""


def _dotted_name(location: tuple[int | str, ...], fields: Fields) -> str:
    """pydantic's location without the names of union members: ("method", "lora", "rank") -> `method.rank`."""
    name = ""
    for part in location:
        longer = f"{name}.{part}" if name else str(part)
        if longer in fields.leaves:
            return longer
        if longer in fields.sections:
            name = longer
        elif name not in fields.choices:
            return longer
    return name
