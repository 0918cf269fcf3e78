"""A folder that holds a run chunk by chunk, so that a stopped run goes on where it was.

run.json                  the request, the model, the dtype, and what the run was made with; written once
chunk-00002.safetensors   latents `[B, C, T, h, w]` of a finished chunk
chunk-00002-0.mp4         its frames, one file a video of the batch
state-00003.safetensors   what chunk 3 starts from
state.json                how many chunks are finished, and the prompt schedule if prompts were changed meanwhile: the
                          commit, written last
lock                      there while a call works in the folder
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import helios_cp
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Execution
from helios_cp.config.json_types import from_json
from helios_cp.config.layout import Layout
from helios_cp.config.request import Request, ScheduledPrompt
from helios_cp.files.chunk_files import ChunkFiles
from helios_cp.files.whole_files import write_json, write_tensors
from helios_cp.pipeline.decoding import Chunk
from helios_cp.sampling.state import ChunkState

FORMAT = 1


def versions() -> dict[str, str]:
    """Of what can change a video by rounding: a run folder and a report keep them."""
    libraries = {name: version(name) for name in ("diffusers", "transformers", "av")}  # seconds to import
    return {"helios_cp": helios_cp.__version__, "torch": str(torch.__version__), **libraries}


@dataclass(frozen=True)
class MadeWith:
    """What changes a video by rounding alone: the layout of the ranks, the card, the versions of the libraries."""

    layout: Layout | None = None
    device: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def differences(self, now: MadeWith) -> list[str]:
        """What is not as it was, such as "torch 2.12.0, now 2.13.0"; what either does not say is left out."""
        pairs = [("", self.device, now.device)]
        pairs += [(f"{name} ", was, now.versions.get(name)) for name, was in self.versions.items()]
        if self.layout and now.layout:
            pairs.insert(0, ("", _told(self.layout), _told(now.layout)))
        return [f"{name}{was}, now {now}" for name, was, now in pairs if was and now and was != now]


def _told(layout: Layout) -> str:
    return f"{layout.degrees}, attention {layout.attention}" + ", weights sharded" * layout.shard_weights


@dataclass(frozen=True)
class Run:
    """What decides a video: the resolved request, the checkpoint, dtype and execution. And its files, and what made it.

    The `model` of a hub names its commit, as in `owner/name@commit`.
    """

    request: Request
    model: str
    dtype: str
    output: tuple[str, ...]
    execution: Execution = field(default_factory=Execution)
    made_with: MadeWith = field(default_factory=MadeWith)


@dataclass(frozen=True)
class Commit:
    """What is finished: how many chunks, the file of what the next one starts from, and how prompts were changed."""

    chunks: int
    state: str
    prompt_schedule: tuple[ScheduledPrompt, ...] = ()


class RunFolder(ChunkFiles):
    """Reads and writes one run. A kill at any moment leaves the last committed chunk intact."""

    def __init__(self, path: Path, run: Run) -> None:
        super().__init__(path, run.request.batch_size)
        self.run = run

    @staticmethod
    def is_run(path: Path) -> bool:
        """Whether a run, or what is left of one, is kept in `path`."""
        return any((path / name).exists() for name in ("run.json", "state.json"))

    @classmethod
    def create(cls, path: Path, run: Run) -> RunFolder:
        """Start a new run in a folder that holds none."""
        write_json(path / "run.json", {"format": FORMAT, **asdict(run)})
        return cls(path, run)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open a run to go on with. Raises `RequestError` if `path` holds none, or it is not whole."""
        with _readable(path, "run.json"):
            try:
                values = json.loads((path / "run.json").read_text(encoding="utf-8"))
            except (FileNotFoundError, NotADirectoryError):
                raise RequestError(
                    f"run folder {path}: no run is kept there (run.json is missing); --checkpoint-dir starts one"
                ) from None
            if (format := values.pop("format")) != FORMAT:
                raise RequestError(f"run folder {path}: it has format {format}, this version reads {FORMAT}")
            run = from_json(Run, values)
            if len(run.output) != run.request.batch_size:
                raise ValueError(f"{len(run.output)} outputs for {run.request.batch_size} video(s)")
        folder = cls(path, run)
        folder._check_whole()
        return folder

    def count(self) -> int:
        """How many chunks are committed."""
        return self._commit().chunks

    def current(self, request: Request) -> Request:
        """The run's request with the changes of prompt while it was made: what all its chunks are made of.

        It asks for no fewer chunks than are finished, as these stay.
        """
        frames = max(request.num_frames, self.count() * request.frames_per_chunk)
        return replace(request, num_frames=frames).with_schedule(self._commit().prompt_schedule)

    def end_at(self, num_frames: int) -> None:
        """Make the video longer or shorter than it was begun; no chunk depends on how many there are."""
        if num_frames != self.run.request.num_frames:
            self.run = replace(self.run, request=replace(self.run.request, num_frames=num_frames))
            write_json(self.path / "run.json", {"format": FORMAT, **asdict(self.run)})

    def commit(self, chunk: Chunk, segments: Sequence[bytes], schedule: Sequence[ScheduledPrompt] = ()) -> None:
        """Save a chunk with its MP4 segments, one a video of the batch, and count it as finished.

        `schedule` is what the request has now where its prompt may change; without one, that of the chunk before stays.
        """
        kept = schedule or self._commit().prompt_schedule
        self.save(chunk.index, segments, chunk.latents)
        state = f"state-{chunk.state.index:05d}.safetensors"
        write_tensors(self.path / state, chunk.state.to_tensors())
        write_json(self.path / "state.json", asdict(Commit(chunk.state.index, state, tuple(kept))))
        for stale in self.path.glob("state-*.safetensors"):
            if stale.name != state:
                stale.unlink(missing_ok=True)

    def state(self, device: torch.device) -> ChunkState | None:
        """What the next chunk starts from, or `None` before the first."""
        commit = self._commit()
        if not commit.chunks:
            return None
        tensors = self._load(commit.state)
        with _readable(self.path, commit.state):
            return ChunkState.from_tensors(commit.chunks, tensors, device)

    def latents(self, chunk: int) -> Tensor:
        """`[B, C, T, h, w]` of a finished chunk, fp32, on the CPU."""
        return self._load(self._latents(chunk).name)["latents"]

    def _check_whole(self) -> None:
        """Raises `RequestError` if what the commit counts as finished is not there."""
        for chunk in range(self.count()):
            for path in (self._latents(chunk), *(self.segment(chunk, video) for video in range(self.videos))):
                if not path.is_file():
                    raise RequestError(
                        f"run folder {self.path}: {path.name} is missing, though state.json counts chunk {chunk} as "
                        "finished; give --checkpoint-dir another folder"
                    )
        self.state(torch.device("cpu"))

    def _commit(self) -> Commit:
        with _readable(self.path, "state.json"):
            try:
                values = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
            except FileNotFoundError:
                return Commit(0, "")
            if values.pop("prompts", None):
                raise ValueError("its prompts were changed by an older version, which did not keep how")
            commit = from_json(Commit, values)
            if not 0 <= commit.chunks <= self.run.request.num_chunks:
                raise ValueError(f"{commit.chunks} chunks of {self.run.request.num_chunks}")
            return commit

    def _load(self, name: str) -> dict[str, Tensor]:
        with _readable(self.path, name):
            return load_file(self.path / name)


@contextmanager
def _readable(folder: Path, name: str) -> Iterator[None]:
    """Inside, what is wrong with a file of a run folder becomes a `RequestError` that names it."""
    try:
        yield
    except RequestError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise RequestError(f"run folder {folder}: {name} cannot be read: {reason}") from None
