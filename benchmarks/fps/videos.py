"""One video a program, made chunk by chunk in turns: ours and diffusers', each chunk timed until it is in the MP4."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import diffusers
import torch
from diffusers.models.transformers import transformer_helios
from torch import Tensor

from benchmarks.measuring.device_rates import seconds_of, wait
from benchmarks.models.repaired_diffusers import block_noise, same_dtype_attention
from helios_cp.config.request import Request
from helios_cp.config.sampling_plan import SamplingPlan
from helios_cp.files.chunk_files import ChunkFiles
from helios_cp.files.mp4 import encode_segment
from helios_cp.generate.background import BackgroundWriter
from helios_cp.model.codec import latent_statistics, to_frames
from helios_cp.pipeline.pipeline import Pipeline
from helios_cp.pipeline.start import Inputs


@dataclass(frozen=True)
class ChunkTimes:
    """Seconds of one chunk.

    `total` is the time between two chunks in the MP4, as a user waits for them; `made` leaves the MP4 out. `stages` are
    denoise, decode, transfer and encode, and each pyramid stage (denoise_1, ...), as far as the program tells. Where
    stages of two chunks run beside each other they add up to more than the total.
    """

    total: float
    made: float
    stages: dict[str, float]


class Video(Protocol):
    """A video under way, of more chunks than are asked for: so none that is timed is the last."""

    def chunk(self) -> tuple[ChunkTimes, Tensor]:
        """Make the next chunk; its times and its latents `[1, C, T, h, w]`, on the device."""

    def alone(self) -> dict[str, float]:
        """Seconds of stages of the last chunk with nothing beside them, where `chunk` does not tell."""

    def close(self) -> None:
        """Give up what is not yet made."""


class OurVideo:
    """`Pipeline.stream`, and what `helios_cp.generate` does with its chunks. Ranks other than 0 write nothing.

    A chunk is encoded beside the making of the next, as `helios_cp.generate` does it, and therefore at the beginning of
    the next turn; only the first is encoded in its own. A turn ends when all that was begun in it is done.
    """

    def __init__(self, pipeline: Pipeline, request: Request, inputs: Inputs, path: Path) -> None:
        self.pipeline = pipeline
        self.fps = request.fps
        self.path, self.files = path, ChunkFiles.beside([path])
        self.background = BackgroundWriter(self._encode)
        self.chunks = pipeline.stream(replace(request, prompt=()), inputs)  # the embeddings come in its place
        self.latents: Tensor | None = None
        self._frames: Tensor | None = None
        self._encode_seconds = 0.0

    def chunk(self) -> tuple[ChunkTimes, Tensor]:
        start, is_first = time.perf_counter(), self.latents is None
        self._write()
        chunk = next(self.chunks)
        wait(self.pipeline.device)
        made = time.perf_counter() - start
        self._frames, self.latents, stages = chunk.frames, chunk.latents, dict(chunk.seconds)
        if is_first:
            self._write()
        self.background.wait()
        pyramid = [seconds for name, seconds in stages.items() if name.startswith("denoise_")]
        stages["denoise"] = sum(pyramid) + stages.pop("conditions", 0.0)
        stages["encode"] = self._encode_seconds
        return ChunkTimes(time.perf_counter() - start, made, stages), chunk.latents

    def _write(self) -> None:
        if self._frames is not None:
            self.background.put(self._frames[0].cpu())
            self._frames = None

    def _encode(self, frames: Tensor) -> None:
        start = time.perf_counter()
        self.files.save(self.files.count(), [encode_segment(frames, self.fps)])
        self._encode_seconds = time.perf_counter() - start

    def alone(self) -> dict[str, float]:
        """Every rank calls it, as the VAE may be split."""
        device, codec = self.pipeline.device, self.pipeline.codec
        with torch.no_grad():
            decode = seconds_of(lambda: codec.decode(self.latents, "uint8"), device, repeats=3, warmup=1)
            frames = codec.decode(self.latents, "uint8")
            found = {"decode": decode}
            if frames is not None:
                host = torch.empty(frames.shape, dtype=frames.dtype, pin_memory=device.type == "cuda")
                found["transfer"] = seconds_of(lambda: host.copy_(frames, non_blocking=True), device)
        return found

    def close(self) -> None:
        self.chunks.close()
        wait(self.pipeline.device)
        with self.background:
            pass
        self.files.join([self.path])
        self.files.remove()


class PeerVideo:
    """diffusers' own pipeline, stopped after each chunk so that others can have their turn.

    It makes a video in one call, which therefore runs in a thread of its own, and waits wherever a chunk is decoded.
    Its frames become bytes and go into an MP4 as ours do, but in turn, as it has nothing that does so beside the next
    chunk. What it does itself with the whole video at the end is left out.
    """

    def __init__(
        self, peer: diffusers.DiffusionPipeline, request: Request, inputs: Inputs, plan: SamplingPlan, path: Path
    ) -> None:
        self.peer = peer
        self.device = peer.vae.device
        self.fps = request.fps
        self.path, self.files = path, ChunkFiles.beside([path])
        self.arguments = peer_arguments(request, inputs, plan, self.device)
        self._turns: queue.SimpleQueue[Clock | None] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._clock: Clock | None = None
        self._thread = threading.Thread(target=self._run, name="diffusers", daemon=True)

    def chunk(self) -> tuple[ChunkTimes, Tensor]:
        clock = Clock(self.device)
        if not self._thread.is_alive():
            self._thread.start()
        self._turns.put(clock)
        made = self._made.get()
        if isinstance(made, BaseException):
            raise made
        denoise, decode, frames, latents = made
        host = frames[0].cpu()
        transfer = clock.lap()
        made = clock.total
        self.files.save(self.files.count(), [encode_segment(host, self.fps)])
        stages = {"denoise": denoise, "decode": decode, "transfer": transfer, "encode": clock.lap()}
        mean, inverse_std = latent_statistics(self.peer.vae)
        return ChunkTimes(clock.total, made, stages), (latents - mean) * inverse_std

    def alone(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        if self._thread.is_alive():
            self._turns.put(None)
            self._thread.join()
        self.files.join([self.path])
        self.files.remove()

    def _run(self) -> None:
        try:
            self._wait_for_turn()
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            with mock.patch.object(self.peer.vae, "decode", self._decode_and_wait(self.peer.vae.decode)):
                self.peer(**self.arguments)
        except _GivenUp:
            pass
        except BaseException as error:
            self._made.put(error)

    def _decode_and_wait(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        def decode_and_wait(latents: Tensor, return_dict: bool = True) -> tuple[Tensor]:
            denoise = self._clock.lap()
            video = decode(latents, return_dict=False)
            frames = to_frames(video[0].movedim(1, -1), "uint8")
            self._made.put((denoise, self._clock.lap(), frames, latents))
            del frames
            self._wait_for_turn()
            return video

        return decode_and_wait

    def _wait_for_turn(self) -> None:
        self._clock = self._turns.get()
        if self._clock is None:
            raise _GivenUp


class _GivenUp(BaseException):
    """Ends diffusers' call from inside."""


class Clock:
    """Seconds from its start, in laps; waits for the device at each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        wait(device)
        self._start = self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        wait(self.device)
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds

    @property
    def total(self) -> float:
        """Seconds up to the last lap."""
        return self._last - self._start


def peer_arguments(request: Request, inputs: Inputs, plan: SamplingPlan, device: torch.device) -> dict[str, Any]:
    """What diffusers calls the fields of a resolved request."""
    arguments: dict[str, Any] = {
        "prompt_embeds": inputs.prompt_embeds.to(device),
        "height": request.height,
        "width": request.width,
        "num_frames": request.num_frames,
        "guidance_scale": plan.guidance_scale,
        "generator": torch.Generator().manual_seed(request.seeds[0]),
        "output_type": "latent",
    }
    if plan.is_guided:
        arguments["negative_prompt_embeds"] = inputs.negative_prompt_embeds.to(device)
    if plan.is_pyramid:
        arguments["pyramid_num_inference_steps_list"] = list(plan.steps)
        arguments |= {"use_zero_init": request.use_zero_init, "zero_steps": request.zero_steps}
        arguments["is_amplify_first_chunk"] = plan.amplify_first_chunk
    else:
        arguments["num_inference_steps"] = plan.steps[0]
    return arguments


@contextlib.contextmanager
def repaired(peer: diffusers.DiffusionPipeline) -> Iterator[Sequence[str]]:
    """diffusers with those defects mended that would stop it or change its numbers (tests/reference.py); says which."""
    repairs = []
    if isinstance(peer, diffusers.HeliosPyramidPipeline):
        gamma = peer.scheduler.config.gamma
        peer.sample_block_noise = lambda *arguments: block_noise(gamma, *arguments)
        peer.transformer.register_forward_hook(lambda module, inputs, output: (output[0].contiguous(),))
        repairs += ["block noise is factorised in fp64: in fp32 its covariance is singular and Cholesky raises"]
        repairs += ["the transformer's output is made contiguous: CFG-Zero* calls view on it"]
    with contextlib.ExitStack() as stack:
        if peer.transformer.config.is_amplify_history:
            patch = mock.patch.object(transformer_helios, "dispatch_attention_fn", same_dtype_attention)
            stack.enter_context(patch)
            repairs.append("amplified keys are rounded back to the model's dtype")
        yield repairs
