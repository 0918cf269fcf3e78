"""Log lines for machines, one JSON object each: no key, no token, and prompts only where that is asked for."""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

logger = logging.getLogger("launchers.serve")

TEXTS = ("prompt", "negative_prompt")
"""Fields that hold what users wrote."""


class JsonLines(logging.Formatter):
    """Time, level and event, and the fields of `Log`; records of other libraries too."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            fields = {**fields, **fault_of(record.exc_info[1])}
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": at, "level": record.levelname.lower(), "logger": record.name, "event": record.getMessage()}
        return json.dumps({**line, **fields}, default=str)


class Log:
    """Tells events by name. With `prompts` what users wrote is told too; else only how long it is."""

    def __init__(self, *, prompts: bool = False) -> None:
        self._prompts = prompts

    def event(self, name: str, *, level: int = logging.INFO, **fields: Any) -> None:
        for text in TEXTS:
            if text in fields and not self._prompts:
                fields[f"{text}_characters"] = len(fields.pop(text) or "")
        logger.log(level, name, extra={"fields": {key: value for key, value in fields.items() if value is not None}})

    def fault(self, name: str, error: BaseException, **fields: Any) -> None:
        """An error of the server's own. Its message may quote what a user wrote, so it is told with prompts only."""
        message = {"message": str(error)} if self._prompts else {}
        self.event(name, level=logging.ERROR, **fault_of(error), **message, **fields)


def fault_of(error: BaseException) -> dict[str, Any]:
    """The kind of an error, and the lines of code that led to it."""
    frames = traceback.extract_tb(error.__traceback__)
    return {"error": type(error).__name__, "at": [f"{each.filename}:{each.lineno} {each.name}" for each in frames]}


@contextmanager
def json_lines(stream: TextIO) -> Iterator[None]:
    """Inside, everything that is logged goes to `stream` as JSON lines: events of the server, warnings of others."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    root, level = logging.getLogger(), logger.level
    root.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        logger.setLevel(level)
