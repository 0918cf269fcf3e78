"""Whether values read from JSON are of the types that a dataclass declares."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints


def check_types(cls: type, values: Mapping[str, Any]) -> None:
    """Raises `TypeError` for a name that is no field of the dataclass `cls`, or a value of another type than declared.

    Understands plain classes, unions, `tuple[X, ...]` and tuples of a fixed length. An int passes for a float, a bool
    for a bool only.
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
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)
