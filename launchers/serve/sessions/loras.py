"""LoRA files that clients may ask for: by their names in one folder, never by a path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helios_cp.config.execution import Adapter
from launchers.serve.problems import Refusal

SUFFIX = ".safetensors"
MOST_SCALE = 10
MOST_FILES = 8


def names(folder: Path | None) -> list[str]:
    """Those that are there now, without `.safetensors`."""
    return [] if folder is None else sorted(path.stem for path in folder.glob(f"*{SUFFIX}"))


def adapters(asked: Any, folder: Path | None) -> tuple[Adapter, ...]:
    """What a client asks for: a name, an object with name and scale, or a list of these. Raises `Refusal`."""
    entries = asked if isinstance(asked, list) else [asked]
    if len(entries) > MOST_FILES:
        raise _refusal(f"{len(entries)} are too many; {MOST_FILES} are allowed")
    return tuple(_adapter(entry, folder) for entry in entries)


def _adapter(entry: Any, folder: Path | None) -> Adapter:
    entry = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or entry.keys() - {"name", "scale"}:
        raise _refusal("a name, or an object with name and scale, is allowed")
    name, scale = entry["name"], entry.get("scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= MOST_SCALE:
        raise _refusal(f"scale: a number from -{MOST_SCALE} to {MOST_SCALE} is allowed")
    if name not in names(folder):
        known = ", ".join(names(folder)) or "none; --loras names a folder of them"
        raise _refusal(f"{name[:64]!r}: there is no such file; there are: {known}")
    return Adapter(str((folder / f"{name}{SUFFIX}").absolute()), float(scale))


def _refusal(reason: str) -> Refusal:
    return Refusal("invalid_request", f"lora: {reason}", param="lora")
