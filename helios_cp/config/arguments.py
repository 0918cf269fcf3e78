"""Flags made from the fields of frozen dataclasses: name, default, help and bounds of a flag are stated once, there.

Nothing here imports torch: a misspelt flag is answered at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NoReturn

from helios_cp.config.errors import RequestError
from helios_cp.config.paths import user_path


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line on stderr, without the usage text, and exits with 2; abbreviates no flags.

    `is_quiet` is for ranks other than 0, which would say the same.
    """

    is_quiet = False

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.removeprefix("argument ").split())
        if line.startswith("unrecognized arguments"):
            line += "; --help lists the flags, and a text of several words needs quotes"
        self.exit(2, None if self.is_quiet else f"{self.prog}: error: {line}\n")


def whole_number(text: str) -> int:
    """For `type=`: an int, or the error that argparse shows after the flag's name."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def number(text: str) -> float:
    """For `type=`: a float, or the error that argparse shows after the flag's name."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def frame_rate(text: str) -> float:
    """For `type=`: frames a second, written as 24, 29.97 or 30000/1001, or the error that argparse shows."""
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number such as 24, 29.97 or 30000/1001") from None
    return rate.numerator if rate.denominator == 1 else float(rate)


PARSERS: dict[str, Callable[[str], Any]] = {"int": whole_number, "float": number, "Path": user_path, "str": str}
"""By the type of a field without its `None` and `tuple[…]`."""


@dataclass(frozen=True)
class Flag:
    """What is known of a flag beside the name, type and default of its field.

    `name` is that of the field unless given. `sets` are the fields that the values of one flag set in turn. `convert`
    makes the value of a field, or each of a flag that is repeated, from what was parsed. `group` is the heading in
    `--help` from this flag on.
    """

    help: str
    metavar: str | tuple[str, ...] | None = None
    name: str | None = None
    group: str | None = None
    choices: tuple[str, ...] | None = None
    parse: Callable[[str], Any] | None = None
    convert: Callable[[Any], Any] | None = None
    nargs: int | str | None = None
    repeat: bool = False
    sets: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    above: float | None = None


def flag(default: Any, help: str, metavar: str | tuple[str, ...] | None = None, **about: Any) -> Any:
    """A field of a dataclass that a flag sets. `about` are further fields of `Flag`."""
    return dataclasses.field(default=default, metadata={"flag": Flag(help, metavar, **about)})


def flags_of(cls: type) -> dict[str, Flag]:
    """The flags of a dataclass by field."""
    return {field.name: field.metadata["flag"] for field in dataclasses.fields(cls) if "flag" in field.metadata}


def flag_name(cls: type, field: str) -> str:
    """The flag that sets a field of a dataclass, such as `--pyramid-steps`."""
    about = next((each for each in flags_of(cls).values() if field in each.sets), None) or flags_of(cls).get(field)
    return (about and about.name) or "--" + field.replace("_", "-")


def add_flags(
    parser: argparse.ArgumentParser, cls: type, only: tuple[str, ...] = (), without: tuple[str, ...] = ()
) -> None:
    """Add the flags of a dataclass, or of some fields of it. What a user leaves out is absent from the namespace."""
    group: argparse._ActionsContainer = parser
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, about in flags_of(cls).items():
        if only and name not in only:
            continue
        if about.group is not None and not only:
            group = parser.add_argument_group(about.group)
        if name in without:
            continue
        kind = str(fields[name].type).removesuffix(" | None")
        options: dict[str, Any] = {"dest": name, "help": _help(cls, name, about), "default": argparse.SUPPRESS}
        if kind == "bool":
            group.add_argument(flag_name(cls, name), action=argparse.BooleanOptionalAction, **options)
            continue
        item = kind.removeprefix("tuple[").split(",")[0].rstrip("]")
        options |= {"type": about.parse or PARSERS.get(item, str), "metavar": about.metavar, "choices": about.choices}
        options["nargs"] = about.nargs or ("+" if kind.startswith("tuple[") and not about.repeat else None)
        if about.repeat:
            options["action"] = "append"
        group.add_argument(flag_name(cls, name), **options)


def given(cls: type, arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of a dataclass that the user set, as the dataclass takes them. Raises `RequestError`."""
    values = vars(arguments)
    found: dict[str, Any] = {}
    for name, about in flags_of(cls).items():
        if name not in values:
            continue
        value = values[name]
        if about.convert is not None:
            value = [about.convert(each) for each in value] if about.repeat else about.convert(value)
        if not about.sets:
            found[name] = tuple(value) if isinstance(value, list) else value
        elif len(value) == len(about.sets):
            found |= zip(about.sets, value, strict=True)
        else:
            allowed = f"{len(about.sets)} numbers are allowed, {' '.join(about.metavar or ())}"
            raise RequestError(f"{flag_name(cls, name)} {' '.join(map(_shown, value))}: {allowed}")
    return found


def as_typed(name: str, value: Any) -> str:
    """How a user would have given the value, for messages: "--seed 1 2", or "no --image" for one left out."""
    if value is None or value == ():
        return f"no {name}"
    if isinstance(value, bool):
        return name if value else f"--no-{name[2:]}"
    values = value if isinstance(value, tuple) else (value,)
    return " ".join([name, *(shlex.quote(each) if isinstance(each, str) else str(each) for each in values)])


def check_bounds(values: Any) -> None:
    """Raises `RequestError` for a field of a dataclass that is out of its flag's bounds."""
    for name, about in flags_of(type(values)).items():
        value = getattr(values, name)
        if value is None or (about.least, about.most, about.above) == (None, None, None):
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(_fits(each, about) for each in numbers):
            shown = " ".join(map(_shown, numbers))
            raise RequestError(f"{flag_name(type(values), name)} {shown}: {_allowed(about)}")


def _fits(value: float, about: Flag) -> bool:
    return (
        math.isfinite(value)
        and (about.above is None or about.above < value)
        and (about.least is None or about.least <= value)
        and (about.most is None or value <= about.most)
    )


def _allowed(about: Flag) -> str:
    least, most = _shown(about.least), _shown(about.most)
    if about.above is not None:
        up_to = "" if about.most is None else f", up to {most}"
        return f"a finite number above {_shown(about.above)} is allowed{up_to}"
    if about.most is not None:
        return f"at most {most} is allowed" if about.least is None else f"allowed is {least} to {most}"
    return f"{'a finite number of ' if isinstance(about.least, float) else ''}at least {least} is allowed"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _help(cls: type, name: str, about: Flag) -> str:
    """With the default, where the text does not tell it already."""
    defaults = [field.default for field in dataclasses.fields(cls) if field.name in (about.sets or (name,))]
    default = defaults[0]
    if "(default: " in about.help or default is None or default in ((), ""):
        return about.help
    if isinstance(default, bool):
        return f"{about.help} (default: {'on' if default else 'off'})"
    shown = " ".join(map(_shown, default if isinstance(default, tuple) else defaults))
    return f"{about.help} (default: {shown})"
