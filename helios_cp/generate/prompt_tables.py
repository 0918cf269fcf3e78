"""Prompt files as people and spreadsheets write them: text to numbered prompts, or to rows by column."""

from __future__ import annotations

import codecs
import csv
import functools
import io
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helios_cp.config.errors import RequestError

SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl")
DELIMITERS = ",;\t"
PROMPTS = ("refined_prompt", "prompt")
COLUMNS = ("id", *PROMPTS, "image_name", "prompt_index", "prompt_schedule", "lora", "lora_scale")
SHOWN = (*PROMPTS, "prompt_schedule")
"""One of these says what a row shows."""


@dataclass(frozen=True)
class Row:
    """The cells of one row by `COLUMNS`, without blanks around them, and where it stands, for messages."""

    where: str
    cells: dict[str, str]


def read_table(path: Path) -> tuple[set[str], list[Row]]:
    """The columns and rows of a prompt file; the lines of a .txt have the columns id, counted from 0, and prompt.

    Without a suffix, as with a pipe, the first line tells what it is. Raises `RequestError`.
    """
    suffix = path.suffix.lower()
    if suffix not in (*SUFFIXES, ""):
        raise RequestError(f"--prompt-file {path}: the suffix is {suffix!r}; allowed are {', '.join(SUFFIXES)} or none")
    text = _read(path)
    if suffix == ".jsonl" or (not suffix and text.lstrip().startswith("{")):
        return _json_lines(path, text)
    if suffix in (".csv", ".tsv") or (not suffix and _delimiter(text) is not None):
        return _separated(path, text)
    lines = enumerate(filter(None, map(str.strip, text.split("\n"))))
    rows = [Row(f"--prompt-file {path}, prompt {at}", {"id": str(at), "prompt": line}) for at, line in lines]
    return {"id", "prompt"}, rows


def _read(path: Path) -> str:
    """UTF-8, or what a byte order mark says."""
    try:
        content = path.read_bytes() if path.is_file() or path.is_dir() else _read_once(path, path.stat().st_ino)
    except OSError as error:
        raise RequestError(f"--prompt-file {path}: it cannot be read: {error.strerror}") from None
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        reason = "this is no UTF-8 text; save the file as UTF-8, which spreadsheets call CSV UTF-8"
        raise RequestError(f"--prompt-file {path}, line {line}: {reason}") from None
    if "\0" in text:
        line = 1 + text.count("\n", 0, text.index("\0"))
        raise RequestError(f"--prompt-file {path}, line {line}: a zero byte stands there; save the file as UTF-8 text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


@functools.cache
def _read_once(path: Path, inode: int) -> bytes:
    """A pipe gives its content once, and one call may be checked several times. `inode` tells pipes apart."""
    return path.read_bytes()


def _separated(path: Path, text: str) -> tuple[set[str], list[Row]]:
    """Columns in any order and case. Rows of empty cells and columns of other names, or of none, are passed over."""
    hint = re.match(r'"?sep=(.)"?\n', text)  # a line for Excel
    start = hint.end() if hint else 0
    delimiter = hint[1] if hint else _delimiter(text) or ("\t" if path.suffix.lower() == ".tsv" else ",")
    reader = _reader(text[start:], delimiter)
    rows = []

    def where() -> str:
        return f"--prompt-file {path}, line {reader.line_num + (start > 0)}"

    try:
        header = [name.strip().casefold() for name in next(reader, [])]
        for name in COLUMNS:
            if header.count(name) > 1:
                raise RequestError(f"--prompt-file {path}: the column {name} stands there twice; leave one out")
        for cells in reader:
            values = [cell.strip() for cell in cells]
            if any(values[len(header) :]):
                raise RequestError(f"{where()}: more cells than columns; put prompts with commas in double quotes")
            if any(values):
                named = itertools.zip_longest(header, values, fillvalue="")
                rows.append(Row(where(), {name: cell for name, cell in named if name in COLUMNS}))
    except csv.Error as error:
        raise RequestError(f"{where()}: it is no valid CSV: {error}; is a double quote missing?") from None
    columns = set(header) & set(COLUMNS)
    if "id" not in columns or not columns & set(SHOWN):
        found = ", ".join(filter(None, header)) or "none"
        raise RequestError(
            f"--prompt-file {path}: the columns are {found}; needed are id and prompt or refined_prompt, with "
            "image_name for pictures or prompt_index for interactive videos"
        )
    return columns, rows


def _reader(text: str, delimiter: str) -> Any:
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)


def _delimiter(text: str) -> str | None:
    """The one that makes a header with an id and a prompt of the first line."""
    for delimiter in DELIMITERS:
        try:
            names = {name.strip().casefold() for name in next(_reader(text, delimiter), [])}
        except csv.Error:
            continue
        if "id" in names and names & set(SHOWN):
            return delimiter
    return None


def _json_lines(path: Path, text: str) -> tuple[set[str], list[Row]]:
    """An object a line, whose values are texts or numbers; where no line has an id, they are counted from 0."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"--prompt-file {path}, line {number}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise RequestError(f"{where}: it is no valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise RequestError(f'{where}: an object is allowed, such as {{"id": "fox", "prompt": "a red fox"}}')
        cells = {}
        for name, value in values.items():
            column = name.strip().casefold()
            if column not in COLUMNS or value is None:
                continue
            if column == "prompt_schedule" and isinstance(value, list):
                value = json.dumps(value)
            if isinstance(value, bool | list | dict):
                raise RequestError(f"{where}: {name} is {json.dumps(value)}; a text is allowed")
            cells[column] = str(value).strip()
        rows.append(Row(where, cells))
    columns = {name for row in rows for name in row.cells}
    if "id" not in columns:
        rows = [Row(row.where, {"id": str(number), **row.cells}) for number, row in enumerate(rows)]
    return columns | {"id"}, rows
