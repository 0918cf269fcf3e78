"""Chunks of a run that are denoised and not written yet, kept in its folder so that a killed driver does not lose them.

chunk-00005.safetensors   latents, where `RunFolder` keeps them too once the chunk is finished
ahead-00006.safetensors   what chunk 6 starts from; it says that chunk 5 is denoised, and goes when chunk 5 is finished

`helios_cp.generate --resume` knows nothing of them and makes these chunks again, to the same bits.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from helios_cp.config.errors import RequestError
from helios_cp.files.whole_files import write_tensors
from helios_cp.generate.run_folder import RunFolder
from helios_cp.sampling.state import ChunkState


def keep(folder: RunFolder, chunk: int, latents: Tensor, after: ChunkState) -> None:
    """Save a denoised chunk, latents `[B, C, T, h, w]`. Its state is the commit and comes last."""
    write_tensors(folder.path / f"chunk-{chunk:05d}.safetensors", {"latents": latents.contiguous()})
    write_tensors(_path(folder, chunk), after.to_tensors())


def load(folder: RunFolder, first: int) -> list[tuple[Tensor, ChunkState]]:
    """Latents and following state of the denoised chunks from `first`, the first unfinished one, on."""
    found: list[tuple[Tensor, ChunkState]] = []
    for chunk in range(first, folder.run.request.num_chunks):
        try:
            tensors = load_file(_path(folder, chunk))
            state = ChunkState.from_tensors(chunk + 1, tensors, torch.device("cpu"))
            found.append((folder.latents(chunk), state))
        except (OSError, KeyError, SafetensorError, RequestError):  # not there, or not whole: it is made again
            break
    return found


def forget(folder: RunFolder, finished: int) -> None:
    """Remove what is kept of the first `finished` chunks."""
    for path in folder.path.glob("ahead-*.safetensors"):
        if int(path.stem.removeprefix("ahead-")) <= finished:
            path.unlink(missing_ok=True)


def _path(folder: RunFolder, chunk: int) -> Path:
    return folder.path / f"ahead-{chunk + 1:05d}.safetensors"
