"""`--prompt-schedule-file`: prompts with their transitions, and more of a request, as a live session leaves it."""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from helios_cp.config.errors import RequestError
from helios_cp.config.json_types import from_json
from helios_cp.config.paths import expand
from helios_cp.config.request import Request, ScheduledPrompt

EXAMPLE = '[{"prompt": "a red fox", "chunks": 4}, {"prompt": "an owl", "chunks": 4, "transition": 2}]'


def read_schedule_file(path: Path) -> dict[str, Any]:
    """The fields of a request that the file gives, `prompt_schedule` among them.

    It holds a list of entries (see `ScheduledPrompt`), or an object with that list as `prompt_schedule` and other
    fields of `Request` by name; one that is null is left out. Raises `RequestError`.
    """
    where = f"--prompt-schedule-file {path}"
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RequestError(f"{where}: it cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: it is no valid JSON: {error}; a schedule is {EXAMPLE}") from None
    given = {"prompt_schedule": values} if isinstance(values, list) else values
    if not isinstance(given, dict) or not isinstance(given.get("prompt_schedule"), list):
        raise RequestError(f"{where}: a list, or an object with prompt_schedule, is allowed, such as {EXAMPLE}")
    if given.get("prompt"):
        raise RequestError(f"{where}: it has prompt and prompt_schedule; leave prompt out")
    given = {name: value for name, value in given.items() if value is not None and name != "prompt"}
    names = {field.name for field in fields(Request)}
    if unknown := sorted(given.keys() - names):
        raise RequestError(f"{where}: {unknown[0]} is unknown; allowed are {', '.join(sorted(names - {'prompt'}))}")
    try:
        request = from_json(Request, given | {"prompt_schedule": parse_schedule(given["prompt_schedule"])})
    except TypeError as error:
        raise RequestError(f"{where}: {error}; a schedule is {EXAMPLE}") from None
    found = {name: getattr(request, name) for name in given}
    if "lora" in found:
        found["lora"] = tuple(replace(each, path=os.path.abspath(expand(each.path))) for each in found["lora"])
    return found | {name: os.path.abspath(expand(found[name])) for name in ("image", "video") if name in found}


def parse_schedule(values: Any) -> tuple[ScheduledPrompt, ...]:
    """Entries out of JSON. Raises `TypeError`, which says which one is none."""
    if not isinstance(values, list):
        raise TypeError("a list is allowed")
    found = []
    for number, entry in enumerate(values, 1):
        if not isinstance(entry, dict) or not entry.keys() >= {"prompt", "chunks"}:
            raise TypeError(f"entry {number}: prompt and chunks are needed")
        try:
            found.append(from_json(ScheduledPrompt, entry))
        except TypeError as error:
            raise TypeError(f"entry {number}: {error}") from None
    return tuple(found)
