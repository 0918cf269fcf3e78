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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Execution
from helios_cp.config.json_types import check_types
from helios_cp.config.request import Request
from helios_cp.files.whole_files import write_bytes, write_json, write_tensors
from helios_cp.pipeline.chunk import Chunk
from helios_cp.sampling.state import ChunkState

FORMAT = 1


@dataclass(frozen=True)
class Run:
    """What decides every bit of a video: the resolved request, the checkpoint, dtype and execution; and its files."""

    request: Request
    model: str
    dtype: str
    output: tuple[str, ...]
    execution: Execution = field(default_factory=Execution)


class RunFolder:
    """Reads and writes one run. A kill at any moment leaves the last committed chunk intact."""

    def __init__(self, path: Path, run: Run) -> None:
        self.path = path
        self.run = run

    @staticmethod
    def is_run(path: Path) -> bool:
        """Whether a run, or what is left of one, is kept in `path`."""
        return any((path / name).exists() for name in ("run.json", "state.json"))

    @classmethod
    def check_new(cls, path: Path) -> None:
        """Raises `RequestError` if a new run cannot start in `path` because it holds one."""
        if cls.is_run(path):
            raise RequestError(
                f"--checkpoint-dir {path}: it holds a run already; go on with --resume in place of --checkpoint-dir, "
                "or give another folder"
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
        values["execution"] = run.execution.to_json()
        write_json(path / "run.json", {**values, "request": run.request.to_json()})
        return cls(path, run)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open a run to go on with. Raises `RequestError` if `path` holds none, or it is not whole."""
        try:
            values = json.loads((path / "run.json").read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise RequestError(
                    f"--resume {path}: written in format {values['format']}, this version reads {FORMAT}"
                )
            output = tuple(values["output"])
            check_types(Run, {"model": values["model"], "dtype": values["dtype"], "output": output})
            execution = Execution.from_json(values.get("execution", {}))
            run = Run(Request.from_json(values["request"]), values["model"], values["dtype"], output, execution)
            if len(output) != run.request.batch_size:
                raise ValueError(f"{len(output)} outputs for {run.request.batch_size} video(s)")
        except (FileNotFoundError, NotADirectoryError):
            raise RequestError(f"--resume {path}: no run is kept there (run.json is missing)") from None
        except RequestError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"--resume {path}: run.json cannot be read: {_reason(error)}") from None
        folder = cls(path, run)
        folder._check_whole()
        return folder

    def finished_chunks(self) -> int:
        """How many chunks are committed."""
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
        try:
            return ChunkState.from_tensors(commit["chunks"], self._load(commit["state"]), device)
        except KeyError as error:
            raise RequestError(f"--resume {self.path}: {commit['state']} cannot be read: {error} is missing") from None

    def segments(self, chunk: int) -> list[bytes]:
        """The MP4 segments of a finished chunk."""
        return [(self.path / name).read_bytes() for name in self._segment_names(chunk)]

    def latents(self, chunk: int) -> Tensor:
        """`[B, C, T, h, w]` of a finished chunk, fp32, on the CPU."""
        return self._load(f"chunk-{chunk:05d}.safetensors")["latents"]

    def _segment_names(self, chunk: int) -> list[str]:
        return [f"chunk-{chunk:05d}-{video}.mp4" for video in range(self.run.request.batch_size)]

    def _check_whole(self) -> None:
        """Raises `RequestError` if what the commit counts as finished is not there."""
        for chunk in range(self.finished_chunks()):
            for name in (f"chunk-{chunk:05d}.safetensors", *self._segment_names(chunk)):
                if not (self.path / name).is_file():
                    raise RequestError(
                        f"--resume {self.path}: {name} is missing, though state.json counts chunk {chunk} as finished; "
                        "start another run with --checkpoint-dir"
                    )
        self.state(torch.device("cpu"))

    def _commit(self) -> dict[str, Any]:
        try:
            values = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
            commit = {"chunks": int(values["chunks"]), "state": str(values["state"])}
            if not 0 <= commit["chunks"] <= self.run.request.num_chunks:
                raise ValueError(f"{commit['chunks']} chunks of {self.run.request.num_chunks}")
            return commit
        except FileNotFoundError:
            return {"chunks": 0, "state": None}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RequestError(f"--resume {self.path}: state.json cannot be read: {_reason(error)}") from None

    def _load(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.path / name)
        except (OSError, SafetensorError) as error:
            raise RequestError(f"--resume {self.path}: {name} cannot be read: {error}") from None


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
