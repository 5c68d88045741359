"""The settings of a config class as a flat table of dotted names, read off the pydantic models.

Everything else in this package works on this table, so a new section or field needs no change here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Leaf:
    """One setting that holds a value, such as `optim.peak_lr`."""

    name: str
    """Dotted name."""
    choice: str | None
    """The choice it belongs to (`method`), if any."""
    variants: Mapping[str | None, FieldInfo]
    """The field under each option of the choice that has it; {None: field} outside a choice."""


@dataclass(frozen=True)
class Choice:
    """A section of which one of several kinds is in force, such as `method`."""

    name: str
    tag: str
    """Name of the field that says which, without the section: `name`."""
    options: tuple[str, ...]
    default: str | None
    """The option in force where nothing chose one."""

    @property
    def tag_name(self) -> str:
        """Dotted name of the setting that chooses: `method.name`."""
        return f"{self.name}.{self.tag}"


@dataclass(frozen=True)
class Fields:
    """All settings of one config class."""

    leaves: Mapping[str, Leaf]
    choices: Mapping[str, Choice]
    sections: Mapping[str, bool]
    """Dotted name of each section, and whether it may be none as a whole."""
    section_docs: Mapping[str, str]
    """The comment of each section."""

    def variant(self, name: str, in_force: Mapping[str, str | None]) -> FieldInfo | None:
        """The field `name` under the options in force; None where they have no such field."""
        leaf = self.leaves[name]
        return leaf.variants.get(in_force[leaf.choice] if leaf.choice else None)


@cache
def fields_of(model_type: type[BaseModel]) -> Fields:
    """Walk a config class once."""
    leaves: dict[str, Leaf] = {}
    choices: dict[str, Choice] = {}
    sections: dict[str, bool] = {}
    docs: dict[str, str] = {}
    for name, field, choice, option in _walk(model_type, "", None, None):
        types = section_types(field.annotation)
        if field.discriminator:
            choices[name] = _choice(name, field, types)
        if types:
            sections[name] = type(None) in get_args(field.annotation)
            docs[name] = field.description or ""
        else:
            known = leaves[name].variants if name in leaves else {}
            leaves[name] = Leaf(name, choice, {**known, option: field})
    return Fields(leaves, choices, sections, docs)


def section_types(annotation: Any) -> tuple[type[BaseModel], ...]:
    """The config sections among the members of an annotation; empty for a plain value."""
    plain = without_metadata(annotation)
    members = get_args(plain) if get_origin(plain) not in (None, tuple, list, Literal) else (plain,)
    types = [without_metadata(member) for member in members]
    return tuple(kind for kind in types if isinstance(kind, type) and issubclass(kind, BaseModel))


def without_metadata(annotation: Any) -> Any:
    """`Annotated[T, ...]` -> T; anything else unchanged."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def option_of(section: type[BaseModel], tag: str) -> str:
    """The option that a section type stands for: LoraConfig -> `lora`."""
    return str(get_args(section.model_fields[tag].annotation)[0])


def _choice(name: str, field: FieldInfo, types: tuple[type[BaseModel], ...]) -> Choice:
    tag = str(field.discriminator)
    default = getattr(field.default, tag, None)
    return Choice(name, tag, tuple(option_of(kind, tag) for kind in types), default)


def _walk(
    model_type: type[BaseModel], prefix: str, choice: str | None, option: str | None
) -> Iterator[tuple[str, FieldInfo, str | None, str | None]]:
    """Every field below a section: (dotted name, field, enclosing choice, its option)."""
    for key, field in model_type.model_fields.items():
        name = f"{prefix}{key}"
        yield name, field, choice, option
        for kind in section_types(field.annotation):
            if field.discriminator:
                yield from _walk(kind, f"{name}.", name, option_of(kind, str(field.discriminator)))
            else:
                yield from _walk(kind, f"{name}.", choice, option)
