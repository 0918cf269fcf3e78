"""The errors for what a user can put right."""

from __future__ import annotations

from collections.abc import Iterable

Row = tuple[str, bool, str]
"""What is given, whether it is refused, and why or what is allowed."""


class RequestError(ValueError):
    """Bad input, found before work starts. The message is one line: what was given, what is allowed, what to do."""


class CheckpointError(ValueError):
    """The files of a checkpoint are damaged, incomplete or do not fit together. The message names file and key."""


def refuse(rows: Iterable[Row]) -> None:
    """Raises `RequestError` for the first row that refuses; none after it is looked at."""
    for given, is_refused, reason in rows:
        if is_refused:
            raise RequestError(f"{given}: {reason}")
