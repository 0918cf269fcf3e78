"""The workers of the pipeline, as plain classes that Ray turns into actors.

Each loads its part of the checkpoint in `load`, so that a fault in the files is told as an error of that call. They
exchange NumPy arrays. Every unit of work comes back with when it began and ended, by its node's clock.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist

from helios_cp.conditioning import Inputs, initial_state, pixels_to_encode
from helios_cp.config import Request
from helios_cp.device import pick_dtype
from helios_cp.layout import Layout
from helios_cp.run_folder import RunFolder
from helios_cp.video import Mp4Writer, Position, encode_segment
from launchers.arrays import Array, StateArrays


@dataclass(frozen=True)
class Loading:
    """What an actor needs to know to load its part: the same for all actors of a pipeline."""

    model: str
    dtype: str
    device: str
    backend: str
    layout: Layout
    timeout: float
    cache: Path | None = None

    def torch_device(self) -> torch.device:
        """Ray shows an actor only the card that is its own."""
        return torch.device(self.device, 0) if self.device == "cuda" else torch.device(self.device)

    def torch_dtype(self) -> torch.dtype:
        return pick_dtype(self.dtype, torch.device(self.device))


@dataclass(frozen=True)
class Place:
    """Where an actor runs."""

    host: str
    node: str
    pid: int


@dataclass(frozen=True)
class Span:
    """When a unit of work began and ended, in seconds since 1970, and its parts in seconds."""

    begin: float
    end: float
    parts: dict[str, float]


class Clock:
    """Measures one unit of work in parts."""

    def __init__(self) -> None:
        self.begin = self._last = time.time()
        self.parts: dict[str, float] = {}

    def part(self, name: str) -> None:
        """What passed since the last part was this one."""
        now = time.time()
        self.parts[name] = now - self._last
        self._last = now

    def span(self) -> Span:
        return Span(self.begin, self._last, self.parts)


@dataclass(frozen=True)
class ChunkJob:
    """Which chunk to denoise. `prompt` is the version of the prompt, which `request` holds already."""

    video: int
    prompt: int
    request: Request


@dataclass(frozen=True)
class Text:
    """Embeddings of a request's prompts `[B, L, text_dim]`, and of its negative prompt where guidance needs one."""

    prompts: Array
    negative: Array | None
    span: Span


@dataclass(frozen=True)
class Denoised:
    """What the chunk after starts from. The latents travel beside it."""

    state: StateArrays
    span: Span


@dataclass(frozen=True)
class Decoded:
    """A chunk's MP4 segments, one a video of the batch, as bytes in arrays; none where no file is written."""

    segments: tuple[np.ndarray, ...]
    span: Span


@dataclass(frozen=True)
class Target:
    """The files of one video: an MP4 for each of its batch and, with `folder`, the run's own folder."""

    video: int
    paths: tuple[Path, ...]
    fps: int
    folder: RunFolder | None


@dataclass(frozen=True)
class Written:
    """How far the files are, for a new writer to go on from when this one is lost; `None` for one that is closed."""

    positions: tuple[Position | None, ...]
    span: Span


def own_place() -> Place:
    return Place(socket.gethostname(), ray.get_runtime_context().get_node_id(), os.getpid())


class Watched:
    """An actor whose end is seen at once, even when it has nothing to do: `watch` fails with it."""

    def watch(self) -> None:
        """Never returns; runs in a thread of its own."""
        threading.Event().wait()


class TextEncoder(Watched):
    """Prompts to embeddings."""

    def __init__(self, loading: Loading) -> None:
        self.loading = loading

    def load(self) -> Place:
        from helios_cp.text import PromptEncoder
        from helios_cp.weights import load_text_encoder, resolve

        checkpoint = resolve(self.loading.model, self.loading.cache)
        dtype = self.loading.torch_dtype()
        self.encoder = PromptEncoder(*load_text_encoder(checkpoint, self.loading.torch_device(), dtype))
        return own_place()

    @torch.no_grad()
    def encode(self, request: Request, is_guided: bool) -> Text:
        clock = Clock()
        length, dtype = request.max_sequence_length, self.loading.torch_dtype()
        texts = tuple(entry.prompt for entry in request.prompt_schedule) or request.prompt
        prompts = Array.of(self.encoder(texts, length, dtype))
        negative = Array.of(self.encoder([request.negative_prompt], length, dtype)) if is_guided else None
        clock.part("text")
        return Text(prompts, negative, clock.span())


class Decoder:
    """The VAE on one device, on a stream of its own where it has one."""

    def __init__(self, loading: Loading) -> None:
        from helios_cp.vae import Codec
        from helios_cp.weights import load_vae, resolve

        self.device = loading.torch_device()
        checkpoint = resolve(loading.model, loading.cache)
        self.channels = checkpoint.transformer.in_channels
        self.codec = Codec(load_vae(checkpoint, self.device))
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @torch.no_grad()
    def decode(self, latents: Array, fps: int, *, segments: bool, frames: bool) -> tuple[Decoded, np.ndarray | None]:
        """MP4 segments and frames `[B, T, H, W, 3]` uint8 of a chunk's latents; each only if asked for."""
        clock = Clock()
        with contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            pixels = self.codec.decode(latents.tensor(), "uint8").cpu()
        clock.part("decode")
        encoded = ()
        if segments:
            encoded = tuple(np.frombuffer(encode_segment(video, fps), np.uint8) for video in pixels)
            clock.part("encode")
        return Decoded(encoded, clock.span()), pixels.numpy() if frames else None

    @torch.no_grad()
    def start(self, request: Request, media: bytes) -> Denoised:
        """The state before chunk 0 of a request whose picture or clip is the file content `media`."""
        clock = Clock()
        name = "image" if request.image is not None else "video"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, Path(getattr(request, name)).name)
            path.write_bytes(media)
            request, inputs = Inputs().merged(replace(request, **{name: str(path)}))
            videos, hidden = pixels_to_encode(request, inputs)
        posteriors = self.codec.encode(videos)
        state = initial_state(request, inputs, self.codec, posteriors, hidden, self.channels, self.device)
        clock.part("media")
        return Denoised(StateArrays.of(state), clock.span())


class VaeDecoder(Watched):
    """Latents to frames and MP4 segments. Keeps nothing from one chunk to the next."""

    def __init__(self, loading: Loading) -> None:
        self.loading = loading

    def load(self) -> Place:
        self.decoder = Decoder(self.loading)
        return own_place()

    def decode(self, latents: Array, fps: int, segments: bool, frames: bool) -> tuple[Decoded, np.ndarray | None]:
        return self.decoder.decode(latents, fps, segments=segments, frames=frames)

    def start(self, request: Request, media: bytes) -> Denoised:
        return self.decoder.start(request, media)


class DenoiserRank(Watched):
    """One rank of a denoiser group. Every rank gets the same calls; rank 0 answers with the result.

    With `decodes`, rank 0 has a VAE too, for calls from a second thread.
    """

    def __init__(self, loading: Loading, rank: int, decodes: bool) -> None:
        self.loading = loading
        self.rank = rank
        self.decodes = decodes and rank == 0
        self._store: dist.TCPStore | None = None
        self._kept: tuple[tuple[int, int], Any] | None = None

    def rendezvous(self) -> tuple[str, int]:
        """Host and port where the group meets; called on rank 0."""
        host = ray.util.get_node_ip_address()
        self._store = self._make_store(host, 0)
        return host, self._store.port

    def load(self, meeting: tuple[str, int] | None) -> Place:
        """Join the group, which takes all its ranks, and load this rank's part."""
        from helios_cp.parallelize import load_parallel
        from parallel.mesh import Mesh

        loading = self.loading
        self.device = loading.torch_device()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if meeting is not None:
            store = self._store or self._make_store(*meeting)
            dist.init_process_group(
                loading.backend,
                store=dist.PrefixStore("launchers", store),
                rank=self.rank,
                world_size=loading.layout.degrees.world,
                timeout=timedelta(seconds=loading.timeout),
            )
        self.pipeline = load_parallel(
            loading.model,
            Mesh.build(loading.layout.degrees, timeout=timedelta(seconds=loading.timeout)),
            dtype=loading.torch_dtype(),
            device=self.device,
            attention=loading.layout.attention,
            cache=loading.cache,
            shard_weights=loading.layout.shard_weights,
            denoise_only=True,
        )
        self.decoder = Decoder(loading) if self.decodes else None
        return own_place()

    @torch.no_grad()
    def denoise(self, job: ChunkJob, text: Text, before: Denoised | None) -> tuple[Denoised | None, Array | None]:
        """The next chunk of a video: its state and its latents `[B, C, T, h, w]` fp32.

        `before` is what the last chunk, or the picture or clip, left; `None` for a video that starts from nothing.
        """
        clock = Clock()
        request, inputs = Inputs().merged(job.request)
        if before is None:
            channels = self.pipeline.checkpoint.transformer.in_channels
            state = initial_state(request, inputs, None, [], 0, channels, self.device)
        else:
            state = before.state.state(self.device)
        prompts = self._prompts(job, request, inputs, text)
        clock.part("conditions")
        latents, following = self.pipeline.denoise(request, inputs, prompts, state)
        if self.rank != 0:
            return None, None
        values, state = Array.of(latents), StateArrays.of(following)
        clock.part("denoise")
        return Denoised(state, clock.span()), values

    def decode(self, latents: Array, fps: int, segments: bool, frames: bool) -> tuple[Decoded, np.ndarray | None]:
        return self.decoder.decode(latents, fps, segments=segments, frames=frames)

    def start(self, request: Request, media: bytes) -> Denoised:
        return self.decoder.start(request, media)

    def forget(self, video: int) -> None:
        """Free what is kept of a video."""
        if self._kept is not None and self._kept[0][0] == video:
            self._kept = None

    def _prompts(self, job: ChunkJob, request: Request, inputs: Inputs, text: Text) -> Any:
        """The keys and values of the prompt in use are kept from chunk to chunk, of one video at a time."""
        key = (job.video, job.prompt)
        if self._kept is None or self._kept[0] != key:
            self._kept = None
            negative = None if text.negative is None else text.negative.tensor()
            embeds = replace(inputs, prompt_embeds=text.prompts.tensor(), negative_prompt_embeds=negative)
            self._kept = (key, self.pipeline.encode_prompts(request, embeds))
        return self._kept[1]

    def _make_store(self, host: str, port: int) -> dist.TCPStore:
        timeout = timedelta(seconds=self.loading.timeout)
        return dist.TCPStore(host, port, is_master=self.rank == 0, wait_for_workers=False, timeout=timeout)


class VideoWriter(Watched):
    """Writes chunks in order into MP4s and run folders. It runs on the driver's node, where the files belong.

    A lost writer loses nothing: every call says how far the files were, and what lies beyond is cut off.
    """

    def __init__(self) -> None:
        self._open: dict[int, list[Mp4Writer | None]] = {}

    def load(self) -> Place:
        return own_place()

    def write(
        self,
        target: Target,
        before: Written | None,
        chunk: int,
        is_last: bool,
        decoded: Decoded,
        latents: Array | None,
        after: Denoised | None,
    ) -> Written:
        """Append a chunk. `latents` and `after` go to the run folder, where there is one. The last chunk closes."""
        clock = Clock()
        segments = [segment.tobytes() for segment in decoded.segments]
        if target.folder is not None:
            target.folder.save(_chunk(chunk, latents, after), segments)
        writers = self._writers(target, before, chunk, is_last)
        for writer, segment in zip(writers, segments, strict=True):
            if writer is not None:
                writer.append(segment)
        positions = tuple(None if writer is None else writer.position for writer in writers)
        if is_last:
            self.close(target.video)
        clock.part("write")
        return Written(positions, clock.span())

    def close(self, video: int) -> None:
        """Finish the files of a video with what they have."""
        for writer in self._open.pop(video, ()):
            if writer is not None:
                writer.close()

    def _writers(self, target: Target, before: Written | None, chunk: int, is_last: bool) -> Sequence[Mp4Writer | None]:
        """A writer for each file, with all chunks before this one in it; `None` where a lost one had just closed it."""
        found = self._open.get(target.video, ())
        if found and all(writer is not None and writer.segments == chunk for writer in found):
            return found
        if before is not None:
            pairs = zip(target.paths, before.positions, strict=True)
            found = [_resume(path, target.fps, position, is_last) for path, position in pairs]
        else:
            found = [Mp4Writer(path, target.fps) for path in target.paths]
            for earlier in range(chunk):  # of the run that this one goes on with
                for writer, segment in zip(found, target.folder.segments(earlier), strict=True):
                    writer.append(segment)
        self._open[target.video] = found
        return found


def _resume(path: Path, fps: int, position: Position, is_last: bool) -> Mp4Writer | None:
    try:
        return Mp4Writer.resume(path, fps, position)
    except FileNotFoundError:
        if not is_last:
            raise
        return None


def _chunk(index: int, latents: Array, after: Denoised) -> Any:
    from helios_cp.pipeline import Chunk

    return Chunk(index, latents.tensor(), None, after.state.state(torch.device("cpu")), {})


class StatusBoard:
    """Holds what the driver last said of its pipeline, for `launchers.status`."""

    def __init__(self) -> None:
        self._shown: dict[str, Any] = {}

    def show(self, values: dict[str, Any]) -> None:
        self._shown = values

    def read(self) -> dict[str, Any]:
        return self._shown
