"""What is held while weights are loaded: tensors of our own, counted exactly, and files that are mapped and read."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.measuring.memory import LiveMemory
from helios_cp.files.tensor_files import read


class OwnMemory(LiveMemory):
    """Without tensors that have no memory: those on the meta device, and what wraps the parts of a quantised one."""

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        try:
            has_memory = storage.device.type != "meta" and storage.data_ptr() != 0
        except RuntimeError:
            has_memory = False
        if has_memory:
            super()._allocate(storage)


def mapped(shard, name: str, part: tuple[slice, ...] = ()) -> torch.Tensor:
    """Read as ever. Unseen, as it is a view of a mapped file."""
    with _disable_current_modes():
        return read(shard, name, part)


def mapped_bytes(folder: Path) -> int:
    """Of the files below a folder, those bytes that this process has mapped and read."""
    found, is_inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):  # where a mapping begins
            is_inside = len(rest) > 4 and rest[4].startswith(str(folder))
        elif is_inside and first == "Rss:":
            found += int(rest[0]) * 1024
    return found
