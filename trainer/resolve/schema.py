"""The JSON schema of --config files, so that editors complete and check them while they are written."""

from typing import Any

from pydantic import BaseModel

from trainer.config import RunConfig


def json_schema(model_type: type[BaseModel] = RunConfig) -> dict[str, Any]:
    """Schema of a partial config: every setting may be left out, none may be unknown."""
    schema = model_type.model_json_schema()
    _relax(schema)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "description": "Settings of a samestep run. `samestep config schema` writes this file.",
        **{key: value for key, value in schema.items() if key != "description"},
    }


def _relax(node: Any) -> None:
    """Drop what only a complete config fulfils, in place.

    Without required keys several methods fit `{rank: 8}` or `{}`: any match is enough. Lists may also be written `a,b`.
    """
    if isinstance(node, list):
        for item in node:
            _relax(item)
    if not isinstance(node, dict):
        return
    node.pop("required", None)
    node.pop("discriminator", None)
    if "oneOf" in node:
        node["anyOf"] = node.pop("oneOf")
    if node.get("type") == "array":
        node["type"] = ["array", "string"]
    for child in list(node.values()):
        _relax(child)
