"""What all sections of the configuration share: their base, the marks of a continued run, number types."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


@dataclass(frozen=True)
class Resume:
    """What a continued run may do with a setting. Unmarked settings must match what the run was started with."""

    rule: Literal["must_match", "may_change"]


MayChange = Resume("may_change")
"""For settings that do not change what is trained beyond rounding: where, how often, how much at a time."""


class Section(BaseModel):
    """Base of all sections: frozen; an unknown key is an error; the line under a field is its documentation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


def may_change(section: BaseModel, prefix: str = "") -> Iterator[str]:
    """Dotted names of the settings that may differ when a run continues; a section marked so stands for all in it."""
    for name, field in type(section).model_fields.items():
        value: Any = getattr(section, name)
        if MayChange in field.metadata:
            yield f"{prefix}{name}"
        elif isinstance(value, BaseModel):
            yield from may_change(value, f"{prefix}{name}.")
