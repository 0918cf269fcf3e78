"""Dataclasses from JSON, with every value checked against the type that its field declares."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class _OtherTypeError(Exception):
    """A value is not of the declared type."""


def from_json(cls: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass from what `dataclasses.asdict` made of it, also by way of JSON; what is left out has its default.

    Raises `TypeError` for names or types that the dataclass, or one inside of it, does not have, and for fields without
    a default that are left out. It understands plain classes, unions, mappings and tuples, which JSON has as lists. An
    int passes for a float, a bool for a bool only.
    """
    hints, read = get_type_hints(cls), {}
    for name, value in values.items():
        if name not in hints:
            raise TypeError(f"{name} is unknown")
        try:
            read[name] = _read(value, hints[name])
        except _OtherTypeError:
            declared = cls.__dataclass_fields__[name].type
            raise TypeError(f"{name} is {value!r}, which is not of type {declared}") from None
    needed = [field.name for field in dataclasses.fields(cls) if field.default is field.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise TypeError(f"{', '.join(missing)} missing")
    return cls(**read)


def _read(value: Any, hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in arguments:
            with suppress(_OtherTypeError):
                return _read(value, option)
    elif origin is tuple and isinstance(value, list | tuple):
        each = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(each) == len(value):
            return tuple(map(_read, value, each))
    elif origin is Mapping and isinstance(value, Mapping):
        return {_read(key, arguments[0]): _read(item, arguments[1]) for key, item in value.items()}
    elif dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_json(hint, value)
    elif isinstance(value, bool):
        if hint is bool:
            return value
    elif origin is None and isinstance(value, (int, float) if hint is float else hint):
        return value
    raise _OtherTypeError
