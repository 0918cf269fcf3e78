"""What one call of the command line makes: one request, or one for each line of a prompt file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from helios_cp.config.errors import RequestError
from helios_cp.config.request import Request, ScheduledPrompt

INTERPOLATE_TIME = 7
"""Chunks for which each prompt of an interactive CSV holds, as in the official script."""


@dataclass(frozen=True)
class Job:
    """A request and the MP4 of each of its videos."""

    request: Request
    output: tuple[Path, ...]


def single_job(request: Request, output: Path) -> Job:
    """`out.mp4`, or `out-0.mp4`, `out-1.mp4`, … for a batch."""
    if request.batch_size <= 1:
        return Job(request, (output,))
    names = (f"{output.stem}-{video}{output.suffix}" for video in range(request.batch_size))
    return Job(request, tuple(output.with_name(name) for name in names))


def read_prompt_file(
    path: Path, request: Request, folder: Path, *, image_folder: Path | None = None, chunks: int = INTERPOLATE_TIME
) -> list[Job]:
    """One job for each prompt of a .txt, or for each video of a .csv with the official script's columns.

    A .txt has a prompt a line and gives `0.mp4`, `1.mp4`, …. A .csv has `id` and `prompt` or `refined_prompt`; with
    `image_name` too, every video starts from that picture in `image_folder`; with `prompt_index` too, the rows of one
    `id` are an interactive schedule in that order, each prompt holding for `chunks` chunks. Raises `RequestError`.
    """
    if request.prompt or request.prompt_schedule:
        raise RequestError(f"--prompt-file {path}: give no --prompt or --prompt-schedule beside it")
    if chunks < 1:
        raise RequestError(f"--interpolate-time {chunks}: at least 1 is allowed")
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".csv"):
        raise RequestError(f"--prompt-file {path}: the suffix is {path.suffix!r}; allowed are .txt and .csv")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(f"--prompt-file {path}: it cannot be read as UTF-8 text: {reason}") from None
    if suffix == ".txt":
        prompts = [line.strip() for line in content.split("\n") if line.strip()]
        requests = [(str(index), replace(request, prompt=(prompt,))) for index, prompt in enumerate(prompts)]
    else:
        requests = _csv_requests(path, content, request, image_folder or path.parent, chunks)
    if not requests:
        raise RequestError(f"--prompt-file {path}: it holds no prompt")
    return [Job(each, (folder / f"{name}.mp4",)) for name, each in requests]


@dataclass(frozen=True)
class _Row:
    """A line of a .csv whose cells have been checked."""

    name: str
    prompt: str
    index: int
    image: str | None


def _csv_requests(
    path: Path, content: str, request: Request, image_folder: Path, chunks: int
) -> list[tuple[str, Request]]:
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    videos: dict[str, list[_Row]] = {}
    try:
        columns = set(reader.fieldnames or ())
        _check_columns(path, columns, request)
        for row in _rows(path, reader, image_folder):
            rows = videos.setdefault(row.name, [])
            if any(other.index == row.index for other in rows):
                again = f"the prompt_index {row.index} of {row.name!r}" if "prompt_index" in columns else repr(row.name)
                raise RequestError(f"--prompt-file {path}, line {reader.line_num}: {again} stands there twice")
            rows.append(row)
    except csv.Error as error:
        raise RequestError(f"--prompt-file {path}, line {reader.line_num}: it is no valid CSV: {error}") from None

    def video(rows: list[_Row]) -> Request:
        if "prompt_index" in columns:
            ordered = sorted(rows, key=lambda row: row.index)
            return replace(request, prompt_schedule=tuple(ScheduledPrompt(row.prompt, chunks) for row in ordered))
        return replace(request, prompt=(rows[0].prompt,), image=rows[0].image or request.image)

    return [(name, video(rows)) for name, rows in videos.items()]


def _check_columns(path: Path, columns: set[str], request: Request) -> None:
    if "id" not in columns or not columns & {"prompt", "refined_prompt"}:
        raise RequestError(
            f"--prompt-file {path}: the columns are {', '.join(sorted(columns)) or 'none'}; needed are id and prompt "
            "or refined_prompt, with image_name for pictures or prompt_index for interactive videos"
        )
    if {"image_name", "prompt_index"} <= columns:
        raise RequestError(f"--prompt-file {path}: the columns image_name and prompt_index exclude each other")
    if "image_name" in columns and request.image is not None:
        raise RequestError(f"--prompt-file {path}: the pictures come from its image_name; give no --image beside it")


def _rows(path: Path, reader: csv.DictReader, image_folder: Path) -> Iterator[_Row]:
    """The checked rows; a CSV without `prompt_index` has 0 in its place. Raises `RequestError`."""
    columns = reader.fieldnames or ()
    for cells in reader:
        where = f"--prompt-file {path}, line {reader.line_num}"
        if None in cells:
            raise RequestError(f"{where}: more cells than columns; put prompts with commas in double quotes")
        values = {column: (cell or "").strip() for column, cell in cells.items()}
        name, index = values["id"], values.get("prompt_index", "0")
        if not name or name.startswith(".") or any(character in name for character in "/\\\0"):
            raise RequestError(f"{where}: the id {name!r} gives no file name; no /, \\ or leading dot is allowed")
        prompt = values.get("refined_prompt") or values.get("prompt")
        if not prompt:
            raise RequestError(f"{where}: the prompt of {name!r} is empty")
        try:
            number = int(index)
        except ValueError:
            raise RequestError(f"{where}: the prompt_index {index!r} of {name!r} is no whole number") from None
        image = None
        if "image_name" in columns:
            image = str((image_folder / values["image_name"]).absolute())
            if not values["image_name"] or not Path(image).is_file():
                raise RequestError(
                    f"{where}: the image_name {values['image_name']!r} of {name!r} is no file in {image_folder}; "
                    "--image-folder says where pictures are"
                )
        yield _Row(name, prompt, number, image)
