"""What one call of the command line makes: one request, or one for each line of a prompt file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from helios_cp.config import Request, RequestError, ScheduledPrompt

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
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RequestError(f"--prompt-file {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--prompt-file {path}: it cannot be read as UTF-8 text: {error}") from None
    if path.suffix == ".txt":
        prompts = [line.strip() for line in content.splitlines() if line.strip()]
        requests = [(str(index), replace(request, prompt=(prompt,))) for index, prompt in enumerate(prompts)]
    elif path.suffix == ".csv":
        requests = list(_csv_requests(path, content, request, image_folder or path.parent, chunks))
    else:
        raise RequestError(f"--prompt-file {path}: .txt and .csv are allowed")
    if not requests:
        raise RequestError(f"--prompt-file {path}: it holds no prompt")
    names = [name for name, _ in requests]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"--prompt-file {path}: the id {name!r} stands there twice")
    return [Job(each, (folder / f"{name}.mp4",)) for name, each in requests]


def _csv_requests(
    path: Path, content: str, request: Request, image_folder: Path, chunks: int
) -> Iterator[tuple[str, Request]]:
    reader = csv.DictReader(io.StringIO(content, newline=""))
    columns = set(reader.fieldnames or ())
    if "id" not in columns or not columns & {"prompt", "refined_prompt"}:
        raise RequestError(
            f"--prompt-file {path}: the columns are {', '.join(sorted(columns)) or 'none'}; needed are id and prompt "
            "or refined_prompt, with image_name for pictures or prompt_index for interactive videos"
        )
    rows: dict[str, list[dict[str, str]]] = {}
    for row in reader:
        name = _cell(row, "id")
        if not name or Path(name).name != name or name.startswith("."):
            raise RequestError(f"--prompt-file {path}, line {reader.line_num}: the id {name!r} is no file name")
        if "prompt_index" not in columns and name in rows:
            raise RequestError(f"--prompt-file {path}, line {reader.line_num}: the id {name!r} stands there twice")
        prompt = _cell(row, "refined_prompt") or _cell(row, "prompt")
        if not prompt:
            raise RequestError(f"--prompt-file {path}, line {reader.line_num}: the prompt is empty")
        rows.setdefault(name, []).append({**row, "text": prompt})
    for name, entries in rows.items():
        if "prompt_index" in columns:
            try:
                entries.sort(key=lambda row: int(_cell(row, "prompt_index")))
            except ValueError:
                raise RequestError(f"--prompt-file {path}: a prompt_index of {name!r} is no whole number") from None
            schedule = tuple(ScheduledPrompt(row["text"], chunks) for row in entries)
            yield name, replace(request, prompt_schedule=schedule)
            continue
        image = request.image
        if "image_name" in columns:
            image = str((image_folder / _cell(entries[0], "image_name")).absolute())
        yield name, replace(request, prompt=(entries[0]["text"],), image=image)


def _cell(row: dict[str, str | None], column: str) -> str:
    return (row.get(column) or "").strip()
