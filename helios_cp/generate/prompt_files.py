"""What one call of the command line makes: one request, or one for each line of a prompt file; and schedule files."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Adapter
from helios_cp.config.json_types import from_json
from helios_cp.config.paths import expand
from helios_cp.config.request import Request, ScheduledPrompt
from helios_cp.generate.prompt_tables import PROMPTS, Row, read_table

SCHEDULE = '[{"prompt": "a red fox", "chunks": 4}, {"prompt": "an owl", "chunks": 4, "transition": 2}]'

INTERPOLATE_TIME = 7
"""Chunks for which each prompt of an interactive CSV holds, as in the official script."""


@dataclass(frozen=True)
class Job:
    """A request, the MP4 of each of its videos, and the run folder that keeps its chunks, if there is one."""

    request: Request
    output: tuple[Path, ...]
    folder: Path | None = None

    @property
    def names(self) -> str:
        return ", ".join(map(str, self.output))


def single_job(request: Request, output: Path) -> Job:
    """`out.mp4`, or `out-0.mp4`, `out-1.mp4`, … for a batch."""
    if request.batch_size <= 1:
        return Job(request, (output,))
    names = (f"{output.stem}-{video}{output.suffix}" for video in range(request.batch_size))
    return Job(request, tuple(output.with_name(name) for name in names))


def read_prompt_file(
    path: Path, request: Request, folder: Path, *, image_folder: Path | None = None, chunks: int = INTERPOLATE_TIME
) -> list[Job]:
    """One job for each prompt of a .txt, or each video of a .csv, .tsv or .jsonl with the official script's columns.

    A .txt has a prompt a line and gives `0.mp4`, `1.mp4`, …. The others have `id` and `prompt` or `refined_prompt`;
    with `image_name` too, every video starts from that picture in `image_folder`; with `prompt_index` too, the rows of
    one `id` are an interactive schedule in that order, each prompt holding for `chunks` chunks. A `prompt_schedule` in
    the place of a prompt is JSON, as in `--prompt-schedule-file`. With `lora`, a path beside the file or an absolute
    one, a video has that adapter in place of those of `--lora`, as strong as `lora_scale`. Raises `RequestError`.
    """
    if request.prompt or request.prompt_schedule:
        raise RequestError(f"--prompt-file {path}: give no --prompt or --prompt-schedule beside it")
    columns, rows = read_table(path)
    for pair in (("image_name", "prompt_index"), ("prompt_schedule", "prompt_index")):
        if columns >= set(pair):
            raise RequestError(f"--prompt-file {path}: the columns {' and '.join(pair)} exclude each other")
    if "image_name" in columns and request.image is not None:
        raise RequestError(f"--prompt-file {path}: the pictures come from its image_name; give no --image beside it")
    pictures = image_folder or (path.parent if path.is_file() else Path())
    is_interactive = "prompt_index" in columns
    videos: dict[str, dict[int, Request]] = {}
    for row in rows:
        name, index = _name_and_index(row)
        parts = videos.setdefault(name, {})
        found = _shown(row, name)
        if "image_name" in columns:
            found["image"] = _picture(row, name, pictures)
        made = replace(request, **found, lora=_lora(row, name, path.parent) or request.lora)
        if index in parts:
            again = f"the prompt_index {index} of " if is_interactive else ""
            raise RequestError(f"{row.where}: {again}{name!r} stands there twice")
        parts[index] = made
    if not videos:
        raise RequestError(f"--prompt-file {path}: it holds no prompt")
    jobs = []
    for name, parts in videos.items():
        ordered = [parts[index] for index in sorted(parts)]
        video = ordered[0]
        if is_interactive:
            schedule = tuple(ScheduledPrompt(part.prompt[0], chunks) for part in ordered)
            video = replace(video, prompt=(), prompt_schedule=schedule)
        # `fsdecode`, because file names are bytes: a locale without a letter of the name still writes it.
        jobs.append(Job(video, (folder / f"{os.fsdecode(name.encode())}.mp4",)))
    return jobs


def _name_and_index(row: Row) -> tuple[str, int]:
    """What the video is called, and the number of its prompt, 0 without a prompt_index."""
    name, index = row.cells.get("id", "").removesuffix(".mp4"), row.cells.get("prompt_index", "0")
    has_control = any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in name)
    if not name or name.startswith(".") or has_control or {"/", "\\"} & set(name):
        raise RequestError(
            f"{row.where}: the id {name!r} gives no file name; no /, \\, line break or leading dot is allowed"
        )
    if not re.fullmatch(r"[+-]?\d+(\.0+)?", index):
        raise RequestError(f"{row.where}: the prompt_index {index!r} of {name!r} is no whole number")
    return name, int(index.partition(".")[0])


def _shown(row: Row, name: str) -> dict[str, Any]:
    """The prompt or the schedule of a row, as fields of a request."""
    prompt = next((row.cells[column] for column in PROMPTS if row.cells.get(column)), None)
    schedule: tuple[ScheduledPrompt, ...] = ()
    if text := row.cells.get("prompt_schedule"):
        try:
            schedule = parse_schedule(json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            reason = f"the prompt_schedule of {name!r} is none: {error}; one is {SCHEDULE}"
            raise RequestError(f"{row.where}: {reason}") from None
    if prompt is None and not schedule:
        raise RequestError(f"{row.where}: the prompt of {name!r} is empty")
    if prompt is not None and schedule:
        raise RequestError(f"{row.where}: {name!r} has a prompt and a prompt_schedule; give one of the two")
    return {"prompt_schedule": schedule} if schedule else {"prompt": (prompt,)}


def _lora(row: Row, name: str, folder: Path) -> tuple[Adapter, ...]:
    """The adapter of a row; none if it names none."""
    path, scale = row.cells.get("lora"), row.cells.get("lora_scale") or "1"
    try:
        weight = float(scale)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise RequestError(f"{row.where}: the lora_scale {scale!r} of {name!r} is no finite number")
    if not path:
        if row.cells.get("lora_scale"):
            raise RequestError(f"{row.where}: {name!r} has a lora_scale and no lora")
        return ()
    found = os.path.abspath(folder / expand(path))
    if not os.path.exists(found):
        raise RequestError(f"{row.where}: the lora {path!r} of {name!r} is no file or folder in {folder}")
    return (Adapter(found, weight),)


def _picture(row: Row, name: str, folder: Path) -> str:
    found = row.cells.get("image_name", "")
    for spelling in (found, found.replace("\\", "/")):  # as Windows writes paths
        path = (folder / os.fsdecode(spelling.encode())).absolute()
        if spelling and path.is_file():
            return str(path)
    hint = "--image-folder says where pictures are"
    near = [each.name for each in path.parent.glob("*") if each.name.casefold() == path.name.casefold()]
    if near:
        hint = f"there is {near[0]}, and capitals matter"
    raise RequestError(f"{row.where}: the image_name {found!r} of {name!r} is no file in {folder}; {hint}")


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
        raise RequestError(f"{where}: it is no valid JSON: {error}; a schedule is {SCHEDULE}") from None
    given = {"prompt_schedule": values} if isinstance(values, list) else values
    if not isinstance(given, dict) or not isinstance(given.get("prompt_schedule"), list):
        raise RequestError(f"{where}: a list, or an object with prompt_schedule, is allowed, such as {SCHEDULE}")
    if given.get("prompt"):
        raise RequestError(f"{where}: it has prompt and prompt_schedule; leave prompt out")
    given = {name: value for name, value in given.items() if value is not None and name != "prompt"}
    names = {field.name for field in fields(Request)}
    if unknown := sorted(given.keys() - names):
        raise RequestError(f"{where}: {unknown[0]} is unknown; allowed are {', '.join(sorted(names - {'prompt'}))}")
    try:
        request = from_json(Request, given | {"prompt_schedule": parse_schedule(given["prompt_schedule"])})
    except TypeError as error:
        raise RequestError(f"{where}: {error}; a schedule is {SCHEDULE}") from None
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
