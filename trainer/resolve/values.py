"""Text -> value by the type of the field, the same way for YAML and for the command line.

So `no` is False for a switch and "no" for a Literal["no", ...], `1e-4` is a number, and `none` is None only where the
field allows it. A quoted value is always that text.
"""

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from trainer.resolve.fields import without_metadata

NONE_WORDS = ("none", "null", "~")
TRUE_WORDS = ("true", "yes", "on")
FALSE_WORDS = ("false", "no", "off")


@dataclass(frozen=True)
class Text:
    """One value as it was written."""

    text: str
    quoted: bool = False

    def __str__(self) -> str:
        return self.text


Raw = Text | tuple[Text, ...]


class UnreadableError(ValueError):
    """A value does not fit its field; the message is the rule."""


def read_value(annotation: Any, raw: Raw) -> Any:
    """The value of `raw` as the type `annotation`; raises UnreadableError with the rule."""
    for kind in _members(annotation):
        try:
            return _read_as(kind, raw)
        except ValueError:
            continue
    raise UnreadableError(f"must be {describe(annotation)}")


def describe(annotation: Any) -> str:
    """A type in words: "a whole number or none"."""
    words = [_describe_one(kind) for kind in _members(annotation)]
    in_order = [word for word in words if word != "none"] + [word for word in words if word == "none"]
    return " or ".join(dict.fromkeys(in_order))


def raw_from_argument(text: str) -> Raw:
    """The right side of `key=value`: `[a, "b, c"]` is a list, a value in quotes is that text, the rest is itself."""
    looks_like_list = text.startswith("[") and text.endswith("]")
    looks_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    if not (looks_like_list or looks_quoted):
        return Text(text)
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError):
        return Text(text)
    return raw_from_node(node)


def raw_from_node(node: yaml.Node | None) -> Raw:
    """The value of a YAML scalar or of a list of scalars; raises UnreadableError for anything deeper."""
    if isinstance(node, yaml.ScalarNode):
        quoted = node.style is not None
        return Text("none" if node.value == "" and not quoted else node.value, quoted)
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return tuple(Text(item.value, item.style is not None) for item in node.value)
    raise UnreadableError("must be a single value or a list of values")


def show_raw(raw: Raw) -> str:
    """A value for a message, cut to a readable length."""
    text = raw.text if isinstance(raw, Text) else f"[{', '.join(item.text for item in raw)}]"
    return text if len(text) <= 60 else f"{text[:57]}..."


def show_value(value: Any) -> str:
    """A value for a message, as it would be written on the command line."""
    if isinstance(value, tuple):
        return ",".join(show_value(item) for item in value)
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _members(annotation: Any) -> list[Any]:
    """The alternatives of a type, those with the narrowest text first."""
    plain = without_metadata(annotation)
    if get_origin(plain) in (Union, types.UnionType):
        members = [inner for member in get_args(plain) for inner in _members(member)]
        return sorted(members, key=_width)
    return [plain]


def _width(kind: Any) -> int:
    order = [Literal, type(None), bool, int, float, tuple, Path, str]
    return order.index(get_origin(kind) or kind)


def _read_as(kind: Any, raw: Raw) -> Any:
    origin = get_origin(kind)
    if origin is tuple:
        return _read_tuple(get_args(kind), raw)
    if isinstance(raw, tuple):
        raise UnreadableError("must be one value")
    if origin is Literal:
        return _read_literal(get_args(kind), raw.text)
    return _READERS[kind](raw)


def _read_tuple(item_types: tuple[Any, ...], raw: Raw) -> tuple[Any, ...]:
    items = raw if isinstance(raw, tuple) else _split(raw)
    if item_types[-1] is Ellipsis:
        return tuple(read_value(item_types[0], item) for item in items)
    if len(items) != len(item_types):
        raise UnreadableError(f"must have {len(item_types)} values")
    return tuple(read_value(kind, item) for kind, item in zip(item_types, items, strict=True))


def _split(raw: Text) -> tuple[Text, ...]:
    if raw.text in NONE_WORDS and not raw.quoted:
        raise UnreadableError("must be a list")
    return tuple(Text(part.strip()) for part in raw.text.split(",")) if raw.text else ()


def _read_literal(options: tuple[Any, ...], text: str) -> Any:
    by_text = {str(option): option for option in options}
    if text not in by_text:
        raise UnreadableError(f"must be one of {', '.join(by_text)}")
    return by_text[text]


def _read_none(raw: Text) -> None:
    if raw.quoted or raw.text.lower() not in NONE_WORDS:
        raise UnreadableError("must be none")


def _read_bool(raw: Text) -> bool:
    word = raw.text.lower()
    if word not in TRUE_WORDS + FALSE_WORDS:
        raise UnreadableError("must be true or false")
    return word in TRUE_WORDS


def _read_int(raw: Text) -> int:
    """Also `1e3`: a person means 1000."""
    try:
        return int(raw.text)
    except ValueError:
        number = float(raw.text)
        if not number.is_integer() or abs(number) > 2**53:
            raise UnreadableError("must be a whole number") from None
        return int(number)


def _read_path(raw: Text) -> Path:
    if not raw.text or "\0" in raw.text:
        raise UnreadableError("must be a path")
    return Path(raw.text)


_READERS: Mapping[Any, Callable[[Text], Any]] = {
    type(None): _read_none,
    bool: _read_bool,
    int: _read_int,
    float: lambda raw: float(raw.text),
    Path: _read_path,
    str: lambda raw: raw.text,
}

_WORDS: Mapping[Any, str] = {
    type(None): "none",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    Path: "a path",
    str: "text",
}


def _describe_one(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        words = [str(argument) for argument in arguments]
        return words[0] if len(words) == 1 else f"one of {', '.join(words)}"
    if origin is tuple:
        count = "a list" if arguments[-1] is Ellipsis else f"{len(arguments)} values"
        return f"{count} ({_describe_one(_members(arguments[0])[0])}, separated by commas)"
    return _WORDS[kind]
