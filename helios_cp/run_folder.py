"""A folder that holds a run chunk by chunk, so that a stopped run goes on where it was.

run.json                  the request, the model and the dtype; written once
chunk-00002.safetensors   latents `[B, C, T, h, w]` of a finished chunk
chunk-00002-0.mp4         its frames, one file a video of the batch
state-00003.safetensors   what chunk 3 starts from
state.json                how many chunks are finished: the commit, written last
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from helios_cp.config import Request, RequestError
from helios_cp.files import write_bytes, write_json, write_tensors
from helios_cp.pipeline import Chunk
from helios_cp.state import ChunkState

FORMAT = 1


@dataclass(frozen=True)
class Run:
    """What decides every bit of a video: the resolved request, the checkpoint and the dtype; and where it goes."""

    request: Request
    model: str
    dtype: str
    output: tuple[str, ...]


class RunFolder:
    """Reads and writes one run. A kill at any moment leaves the last committed chunk intact."""

    def __init__(self, path: Path, run: Run) -> None:
        self.path = path
        self.run = run

    @classmethod
    def check_new(cls, path: Path) -> None:
        """Raises `RequestError` if a new run cannot start in `path`."""
        if path.exists() and not path.is_dir():
            raise RequestError(f"--checkpoint-dir {path}: a file of that name is in the way")
        if (path / "run.json").exists():
            raise RequestError(
                f"--checkpoint-dir {path}: it holds a run already; use --resume {path} or another folder"
            )

    @classmethod
    def create(cls, path: Path, run: Run) -> RunFolder:
        """Start a new run. Raises `RequestError` as `check_new` does, or if the folder cannot be made."""
        cls.check_new(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"--checkpoint-dir {path}: the folder cannot be made: {error.strerror}") from None
        values = {"format": FORMAT, "model": run.model, "dtype": run.dtype, "output": run.output}
        write_json(path / "run.json", {**values, "request": run.request.to_json()})
        return cls(path, run)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open a run to go on with. Raises `RequestError` if `path` holds none that can be read."""
        try:
            values = json.loads((path / "run.json").read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise RequestError(
                    f"--resume {path}: written in format {values['format']}, this version reads {FORMAT}"
                )
            request = Request.from_json(values["request"])
            run = Run(request, values["model"], values["dtype"], tuple(values["output"]))
        except (FileNotFoundError, NotADirectoryError):
            raise RequestError(f"--resume {path}: no run is kept there (run.json is missing)") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"--resume {path}: run.json cannot be read: {error!r}") from None
        folder = cls(path, run)
        folder.finished_chunks()
        return folder

    def finished_chunks(self) -> int:
        """How many chunks are committed. Raises `RequestError` if the commit cannot be read."""
        return self._commit()["chunks"]

    def save(self, chunk: Chunk, segments: Sequence[bytes]) -> None:
        """Commit a chunk with its MP4 segments, one a video of the batch."""
        stem = f"chunk-{chunk.index:05d}"
        write_tensors(self.path / f"{stem}.safetensors", {"latents": chunk.latents.cpu().contiguous()})
        for video, segment in enumerate(segments):
            write_bytes(self.path / f"{stem}-{video}.mp4", segment)
        state = f"state-{chunk.state.index:05d}.safetensors"
        write_tensors(self.path / state, chunk.state.to_tensors())
        write_json(self.path / "state.json", {"chunks": chunk.state.index, "state": state})
        for stale in self.path.glob("state-*.safetensors"):
            if stale.name != state:
                stale.unlink(missing_ok=True)

    def state(self, device: torch.device) -> ChunkState | None:
        """What the next chunk starts from, or `None` before the first."""
        commit = self._commit()
        if not commit["chunks"]:
            return None
        return ChunkState.from_tensors(commit["chunks"], self._load(commit["state"]), device)

    def segments(self, chunk: int) -> list[bytes]:
        """The MP4 segments of a finished chunk."""
        videos = range(self.run.request.batch_size)
        return [(self.path / f"chunk-{chunk:05d}-{video}.mp4").read_bytes() for video in videos]

    def latents(self, chunk: int) -> Tensor:
        """`[B, C, T, h, w]` of a finished chunk, fp32, on the CPU."""
        return self._load(f"chunk-{chunk:05d}.safetensors")["latents"]

    def _commit(self) -> dict[str, Any]:
        try:
            values = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
            return {"chunks": int(values["chunks"]), "state": str(values["state"])}
        except FileNotFoundError:
            return {"chunks": 0, "state": None}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RequestError(f"--resume {self.path}: state.json cannot be read: {error!r}") from None

    def _load(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.path / name)
        except (OSError, SafetensorError) as error:
            raise RequestError(f"--resume {self.path}: {name} cannot be read: {error}") from None
