"""What one call of the command line makes: one request, or one for each line of a prompt file."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Adapter
from helios_cp.config.paths import expand
from helios_cp.config.request import Request, ScheduledPrompt
from helios_cp.generate.prompt_tables import PROMPTS, Row, read_table
from helios_cp.generate.schedule_file import EXAMPLE, parse_schedule

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
    if chunks < 1:
        raise RequestError(f"--interpolate-time {chunks}: at least 1 is allowed")
    table = read_table(path)
    if {"image_name", "prompt_index"} <= table.columns:
        raise RequestError(f"--prompt-file {path}: the columns image_name and prompt_index exclude each other")
    if "image_name" in table.columns and request.image is not None:
        raise RequestError(f"--prompt-file {path}: the pictures come from its image_name; give no --image beside it")
    pictures = image_folder or (path.parent if path.is_file() else Path())
    if {"prompt_schedule", "prompt_index"} <= table.columns:
        raise RequestError(f"--prompt-file {path}: the columns prompt_schedule and prompt_index exclude each other")
    videos: dict[str, dict[int, _Entry]] = {}
    for row in table.rows:
        entry = _entry(row, pictures if "image_name" in table.columns else None, path.parent)
        entries = videos.setdefault(entry.name, {})
        if entry.index in entries:
            again = f"the prompt_index {entry.index} of " if "prompt_index" in table.columns else ""
            raise RequestError(f"{row.where}: {again}{entry.name!r} stands there twice")
        entries[entry.index] = entry
    if not videos:
        raise RequestError(f"--prompt-file {path}: it holds no prompt")

    def video(entries: dict[int, _Entry]) -> Request:
        if "prompt_index" in table.columns:
            ordered = [entries[index] for index in sorted(entries)]
            schedule = tuple(ScheduledPrompt(entry.prompt, chunks) for entry in ordered)
            return replace(request, prompt_schedule=schedule, lora=ordered[0].lora or request.lora)
        only = entries[0]
        made = replace(request, image=only.image or request.image, lora=only.lora or request.lora)
        return replace(made, prompt_schedule=only.schedule) if only.schedule else replace(made, prompt=(only.prompt,))

    # `fsdecode`, because file names are bytes: a locale without a letter of the name still writes it.
    return [Job(video(entries), (folder / f"{os.fsdecode(name.encode())}.mp4",)) for name, entries in videos.items()]


@dataclass(frozen=True)
class _Entry:
    """A row that has been checked; `index` is 0 without a prompt_index."""

    name: str
    prompt: str
    index: int
    image: str | None
    schedule: tuple[ScheduledPrompt, ...]
    lora: tuple[Adapter, ...]


def _entry(row: Row, pictures: Path | None, folder: Path) -> _Entry:
    """Raises `RequestError` for what cannot be a video's name, prompt, index, picture, schedule or adapter."""
    name, index = row.cells.get("id", "").removesuffix(".mp4"), row.cells.get("prompt_index", "0")
    has_control = any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in name)
    if not name or name.startswith(".") or has_control or {"/", "\\"} & set(name):
        raise RequestError(
            f"{row.where}: the id {name!r} gives no file name; no /, \\, line break or leading dot is allowed"
        )
    prompt = next((row.cells[column] for column in PROMPTS if row.cells.get(column)), None)
    schedule = _schedule(row, name)
    if prompt is None and not schedule:
        raise RequestError(f"{row.where}: the prompt of {name!r} is empty")
    if prompt is not None and schedule:
        raise RequestError(f"{row.where}: {name!r} has a prompt and a prompt_schedule; give one of the two")
    if not re.fullmatch(r"[+-]?\d+(\.0+)?", index):
        raise RequestError(f"{row.where}: the prompt_index {index!r} of {name!r} is no whole number")
    image = None if pictures is None else _picture(row, name, pictures)
    return _Entry(name, prompt or "", int(index.partition(".")[0]), image, schedule, _lora(row, name, folder))


def _schedule(row: Row, name: str) -> tuple[ScheduledPrompt, ...]:
    text = row.cells.get("prompt_schedule")
    if not text:
        return ()
    try:
        return parse_schedule(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"{row.where}: the prompt_schedule of {name!r} is none: {error}; one is {EXAMPLE}") from None


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
