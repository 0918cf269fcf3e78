"""Chunks of a run that are denoised and not written yet, kept in its folder so that a killed driver does not lose them.

chunk-00005.safetensors   latents, where `RunFolder` keeps them too once the chunk is finished
ahead-00006.safetensors   what chunk 6 starts from; it says that chunk 5 is denoised, and goes when chunk 5 is finished
ahead-00006.json          the prompt schedule that chunk 5 was made of, or an empty one

`helios_cp.generate --resume` knows nothing of them and makes these chunks again, to the same bits.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from helios_cp.config.json_types import from_json
from helios_cp.config.request import ScheduledPrompt
from helios_cp.files.whole_files import write_json, write_tensors
from helios_cp.generate.run_folder import RunFolder
from helios_cp.sampling.state import ChunkState


@dataclass(frozen=True)
class DenoisedChunk:
    """A denoised chunk: latents `[B, C, T, h, w]`, the state after it, and the prompt schedule of both."""

    latents: Tensor
    after: ChunkState
    schedule: tuple[ScheduledPrompt, ...] = ()


def keep(folder: RunFolder, chunk: int, kept: DenoisedChunk) -> None:
    """Save a denoised chunk. Its state is the commit and comes last."""
    write_tensors(folder.path / f"chunk-{chunk:05d}.safetensors", {"latents": kept.latents.contiguous()})
    path = _path(folder, chunk)
    write_json(path.with_suffix(".json"), [asdict(entry) for entry in kept.schedule])
    write_tensors(path, kept.after.to_tensors())


def load(folder: RunFolder, first: int) -> list[DenoisedChunk]:
    """The denoised chunks from `first`, the first unfinished one, on."""
    found: list[DenoisedChunk] = []
    for chunk in range(first, folder.run.request.num_chunks):
        path = _path(folder, chunk)
        try:
            after = ChunkState.from_tensors(chunk + 1, load_file(path), torch.device("cpu"))
            found.append(DenoisedChunk(folder.latents(chunk), after, _schedule(path.with_suffix(".json"))))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):  # not there, or not whole: it is made again
            break
    return found


def forget(folder: RunFolder, finished: int) -> None:
    """Remove what is kept of the first `finished` chunks."""
    for path in folder.path.glob("ahead-*"):
        if int(path.stem.removeprefix("ahead-")) <= finished:
            path.unlink(missing_ok=True)


def _schedule(path: Path) -> tuple[ScheduledPrompt, ...]:
    return tuple(from_json(ScheduledPrompt, entry) for entry in json.loads(path.read_text(encoding="utf-8")))


def _path(folder: RunFolder, chunk: int) -> Path:
    return folder.path / f"ahead-{chunk + 1:05d}.safetensors"
