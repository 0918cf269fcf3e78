"""Dataclasses from JSON, with every value checked against the type that its field declares."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import MISSING
from itertools import zip_longest
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_json(cls: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass from what `dataclasses.asdict` made of it, also by way of JSON; what is left out has its default.

    Raises `TypeError` for names or types that the dataclass, or one inside of it, does not have, and for fields without
    a default that are left out.
    """
    hints = get_type_hints(cls)
    read = {name: _read(value, hints.get(name)) for name, value in values.items()}
    check_types(cls, read)
    needed = [field.name for field in dataclasses.fields(cls) if field.default is field.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise TypeError(f"{', '.join(missing)} missing")
    return cls(**read)


def _read(value: Any, hint: Any) -> Any:
    """Lists become tuples, and objects dataclasses, where that is declared."""
    if get_origin(hint) in (Union, types.UnionType):
        for option in get_args(hint):
            value = _read(value, option)
    elif get_origin(hint) is tuple and isinstance(value, list | tuple):
        each = get_args(hint)
        hints = each[:1] * len(value) if each[-1] is Ellipsis else each
        return tuple(_read(item, one) for item, one in zip_longest(value, hints))
    elif dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_json(hint, value)
    return value


def check_types(cls: type, values: Mapping[str, Any]) -> None:
    """Raises `TypeError` for a name that is no field of the dataclass `cls`, or a value of another type than declared.

    Understands plain classes, unions, mappings, `tuple[X, ...]` and tuples of a fixed length. An int passes for a
    float, a bool for a bool only.
    """
    hints = get_type_hints(cls)
    for name, value in values.items():
        if name not in hints:
            raise TypeError(f"{name} is unknown")
        if not _fits(value, hints[name]):
            raise TypeError(f"{name} is {value!r}, which is not of type {cls.__dataclass_fields__[name].type}")


def _fits(value: Any, hint: Any) -> bool:
    arguments = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if get_origin(hint) is tuple:
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value) if isinstance(value, tuple) else ()
        return (
            isinstance(value, tuple)
            and len(value) == len(arguments)
            and all(_fits(item, each) for item, each in zip(value, arguments, strict=True))
        )
    if get_origin(hint) is Mapping:
        pairs = value.items() if isinstance(value, Mapping) else [(None, None)]
        return all(_fits(each, one) for pair in pairs for each, one in zip(pair, arguments, strict=True))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)
