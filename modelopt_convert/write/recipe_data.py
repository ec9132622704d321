"""Recipes as plain data, for a process that has not opened the input: no pickle, which may hold anything. No torch."""

import base64
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, cast

from modelopt_convert.checkpoint import recipe
from modelopt_convert.checkpoint.recipe import Recipe
from modelopt_convert.dialects import awq, decoded, nunchaku, resized, values

# Every recipe, and what recipes are made of, by name.
_KINDS: Mapping[str, type[Any]] = {
    name: kind
    for module in (recipe, values, resized, decoded, awq, nunchaku)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and is_dataclass(kind)
}


def to_data(made: Recipe) -> Any:
    """A recipe as JSON has it: the kind with its fields, bytes in base64."""
    return _to_data(made)


def from_data(data: Any) -> Recipe:
    """The inverse of ``to_data``."""
    return cast(Recipe, _from_data(data))


def _to_data(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, tuple):
        return [_to_data(one) for one in value]
    if is_dataclass(value):
        return {"kind": type(value).__name__, "of": [_to_data(getattr(value, one.name)) for one in fields(value)]}
    return value


def _from_data(data: Any) -> Any:
    if isinstance(data, list):
        return tuple(_from_data(one) for one in data)
    if isinstance(data, dict):
        if "bytes" in data:
            return base64.b64decode(data["bytes"])
        return _KINDS[data["kind"]](*(_from_data(one) for one in data["of"]))
    return data
