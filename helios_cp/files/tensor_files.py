"""Safetensors files of a checkpoint: their headers, and their tensors.

torch is imported when a tensor is read, not before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helios_cp.config.errors import CheckpointError

if TYPE_CHECKING:
    import torch

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

Slices = tuple[slice, ...]
"""Which rows, and which columns, of a stored tensor; `()` is all of it."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor by the header of its file. `dtype` is safetensors' name, such as "BF16"."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(folder: Path, stem: str) -> dict[str, StoredTensor]:
    """Where each tensor of a part lies, by the headers of its safetensors files, file after file.

    The files are `<stem>.safetensors`, or those that `<stem>.safetensors.index.json` names. Raises `CheckpointError`
    for a missing or damaged file and for an index that does not tell the truth.
    """
    files = weight_files(folder, stem)
    index = folder / f"{stem}.safetensors.index.json"
    promised: dict[str, str] = read_json(index)["weight_map"] if index.is_file() else {}
    stored: dict[str, StoredTensor] = {}
    for file in files:
        with open_file(file) as shard:
            for name in shard.keys():  # noqa: SIM118 - a safetensors file is no mapping
                if name in stored:
                    raise CheckpointError(f"{file}: {name} is in {stored[name].file.name} too; each key has one place")
                header = shard.get_slice(name)
                stored[name] = StoredTensor(file, tuple(header.get_shape()), str(header.get_dtype()))
    for name, file_name in promised.items():
        if name not in stored or stored[name].file.name != file_name:
            raise CheckpointError(f"{folder / file_name}: {name} is not in this shard, though {index.name} says so")
    return stored


def weight_files(folder: Path, stem: str) -> list[Path]:
    """`<stem>.safetensors`, or the files that `<stem>.safetensors.index.json` names; none is opened.

    Raises `CheckpointError` where one of them is missing, with what is there in its place.
    """
    index = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if not index.is_file():
        if single.is_file():
            return [single]
        raise CheckpointError(f"{single} is missing{_in_its_place(folder, stem)}")
    promised = read_json(index).get("weight_map")
    if not promised or not isinstance(promised, dict):
        raise CheckpointError(f"{index}: has no weight_map; download it again")
    files = [folder / str(name) for name in dict.fromkeys(promised.values())]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{folder / missing[0]}: this shard is missing{and_others(missing)}, {index.name} names it; download it "
            "again"
        )
    return files


def _in_its_place(folder: Path, stem: str) -> str:
    """What a folder holds in place of the weights, and what to do."""
    names = sorted(file.name for file in folder.glob("*"))
    shards = [name for name in names if re.fullmatch(re.escape(stem) + r"-\d{5}-of-\d{5}\.safetensors", name)]
    variants = [name for name in names if name.endswith(".safetensors") and name not in shards]
    pickles = [name for name in names if name.endswith(PICKLES)]
    if shards:
        return (
            f"; {shards[0]}{and_others(shards)} is a shard, and {stem}.safetensors.index.json, which says what is in "
            "which, is missing too: download that"
        )
    if variants:
        return (
            f"; {variants[0]}{and_others(variants)} has another name, as a variant or a format of another program has: "
            f"rename it to {stem}.safetensors if it holds the same keys, or download the model again without a variant"
        )
    if pickles:
        return f"; {pickles[0]} is a pickle, which could run code and is never read: safetensors files are needed"
    return "; download it again"


def check_fit(folder: Path, stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `CheckpointError` unless the stored tensors are the expected ones, in name and shape."""
    missing = [name for name in expected if name not in stored]
    if missing:
        raise CheckpointError(f"{folder}: {missing[0]} is missing from the weights{and_others(missing)}")
    unexpected = [name for name in stored if name not in expected]
    if unexpected:
        name = unexpected[0]
        raise CheckpointError(f"{stored[name].file}: {name} has no place in the model{and_others(unexpected)}")
    for name, where in stored.items():
        if where.shape != expected[name]:
            raise CheckpointError(
                f"{where.file}: {name} has shape {where.shape}; by config.json it must be {expected[name]}"
            )


def and_others(names: list[str]) -> str:
    return f" (and {len(names) - 1} others)" if len(names) > 1 else ""


class Reader:
    """Reads tensors from files that stay mapped into memory while it lives, even if they are deleted meanwhile.

    Opening costs no memory. What is read stays in the system's page cache while there is room, and nowhere else.
    """

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self.stored = stored
        self._shards = {}
        for file in dict.fromkeys(where.file for where in stored.values()):
            with open_file(file) as shard:
                self._shards[file] = shard

    def __call__(self, name: str, part: Slices = ()) -> torch.Tensor:
        """A stored tensor on the CPU, or part of it. It must not be written to."""
        return read(self._shards[self.stored[name].file], name, part)


def read(shard: Any, name: str, part: Slices = ()) -> torch.Tensor:
    """A tensor of an open file, or part of it; no other part is read."""
    return shard.get_slice(name)[part] if part else shard.get_tensor(name)


@contextmanager
def open_file(file: Path) -> Iterator[Any]:
    """A safetensors file. It can be read for as long as it is referred to. Raises `CheckpointError`."""
    from safetensors import SafetensorError, safe_open

    try:
        yield safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: no intact safetensors file ({error}); download it again") from None


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `CheckpointError`."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: does not hold a JSON object")
    return values
