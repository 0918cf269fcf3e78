"""What a run did, in figures."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch

import helios_cp
from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.execution import Execution
from helios_cp.config.layout import Layout
from helios_cp.config.request import Request
from helios_cp.device.device import device_name, dtype_name
from helios_cp.device.memory import peak_memory
from helios_cp.model.codec import vae_settings


def versions() -> dict[str, str]:
    """Of what can change a video by rounding: a run folder and a report keep them."""
    libraries = {name: version(name) for name in ("diffusers", "transformers", "av")}  # seconds to import
    return {"helios_cp": helios_cp.__version__, "torch": str(torch.__version__), **libraries}


@dataclass
class Report:
    """Collects the seconds of each chunk of one video and works out the FPS.

    `remarks` were told before it began. `error` is what ended it. `playable` is where its chunks can be played, if not
    in `output`.
    """

    request: Request
    checkpoint: Checkpoint
    layout: Layout
    dtype: torch.dtype
    device: torch.device
    output: list[str]
    execution: Execution
    remarks: list[str]
    resumed_from_chunk: int = 0
    peak_bytes: int = 0
    vae_group: int | None = None
    error: str | None = None
    playable: str | None = None
    chunks: list[dict[str, Any]] = field(default_factory=list)

    def add(self, index: int, seconds: float, stages: dict[str, float], skipped: Sequence[int] = ()) -> None:
        """A chunk is finished: `seconds` of wall time after the one before, or after the start.

        `stages` are what its parts took. Decoding and writing can pass beside the stages of the next chunk, and then
        the parts are more than the whole. `skipped` as in `Chunk`.
        """
        entry = {"index": index, "seconds": seconds, "stages": dict(stages)}
        if self.execution.block_cache is not None:
            entry["skipped_steps"] = list(skipped)
        self.chunks.append(entry)

    @property
    def names(self) -> str:
        return ", ".join(self.output)

    @property
    def frames(self) -> int:
        """Frames made by this call, of all videos of the batch."""
        return len(self.chunks) * self.request.frames_per_chunk * self.request.batch_size

    def fps(self, *, skip_first: bool = False) -> float | None:
        """Frames per second of wall time, from the prompt to the encoded video; `None` if nothing was timed."""
        chunks = self.chunks[1:] if skip_first else self.chunks
        seconds = sum(chunk["seconds"] for chunk in chunks)
        if not seconds:
            return None
        return len(chunks) * self.request.frames_per_chunk * self.request.batch_size / seconds

    def stage_seconds(self) -> dict[str, float]:
        total: dict[str, float] = defaultdict(float)
        for chunk in self.chunks:
            for name, seconds in chunk["stages"].items():
                total[name] += seconds
        return dict(total)

    @property
    def finished_chunks(self) -> int:
        """Chunks that the video has, those of earlier calls among them."""
        return self.resumed_from_chunk + len(self.chunks)

    def to_json(self) -> dict[str, Any]:
        """`frames`, times and FPS are of this call alone. Seconds of stages overlap, those of chunks do not."""
        return {
            "version": helios_cp.__version__,
            "versions": {"python": platform.python_version(), **versions()},
            "model": str(self.checkpoint.folder),
            "variant": self.checkpoint.variant,
            "random_weights": self.checkpoint.random_weights,
            "dtype": dtype_name(self.dtype),
            "device": device_name(self.device),
            "layout": {"ranks": self.layout.degrees.world, **asdict(self.layout)},
            "execution": asdict(self.execution),
            "vae": {**vae_settings(self.execution, self.device), "latent_frames_together": self.vae_group},
            "seed": list(self.request.seeds),
            "request": asdict(self.request),
            "output": self.output,
            "remarks": self.remarks,
            "complete": self.finished_chunks == self.request.num_chunks,
            "error": self.error,
            "finished_chunks": self.finished_chunks,
            "resumed_from_chunk": self.resumed_from_chunk,
            "frames": self.frames,
            "fps": self.fps(),
            "fps_without_first_chunk": self.fps(skip_first=True),
            "stage_seconds": self.stage_seconds(),
            "chunks": self.chunks,
            "peak_memory_bytes": max(self.peak_bytes, peak_memory(self.device)),
        }

    def summary(self) -> str:
        """The figures for a reader, one a line."""
        rate, rest = self.fps(), self.fps(skip_first=True)
        if rate is None:
            return "all chunks were finished before; only the MP4 was written again"
        steady = f" ({rest:.2f} without the first chunk)" if rest is not None else ""
        lines = [f"{self.frames} frames at {rate:.2f} FPS{steady}"]
        total = sum(chunk["seconds"] for chunk in self.chunks)
        for name, seconds in self.stage_seconds().items():
            lines.append(f"  {name:<12} {seconds:8.2f} s  {100 * seconds / total:5.1f} %")
        lines.append(f"  of {total:.2f} s in all; decode and write can pass beside other stages")
        if self.execution.block_cache is not None:
            skipped = sum(len(chunk["skipped_steps"]) for chunk in self.chunks)
            lines.append(f"  {skipped} steps of {len(self.chunks)} chunks left blocks out")
        return "\n".join(lines)
