"""From a request to a stream of chunks."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Adapter, Execution
from helios_cp.config.request import Request
from helios_cp.config.sampling_plan import SamplingPlan
from helios_cp.device.device import has_streams, make_current
from helios_cp.device.memory import MemoryMeter
from helios_cp.device.streams import Pace
from helios_cp.device.timing import Stopwatch, make_mark
from helios_cp.model.block_cache import BlockCache
from helios_cp.model.codec import OUTPUT_TYPES, Codec
from helios_cp.model.seams import SeamMatcher
from helios_cp.model.text import PromptEncoder
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.pipeline.decoding import Chunk, Denoised, Room, add_frames, with_frames
from helios_cp.pipeline.prepare import prepare_parts
from helios_cp.pipeline.prompts import Branches, Prompts, first_entry, texts_from
from helios_cp.pipeline.start import Inputs, initial_noise, initial_state, pixels_to_encode
from helios_cp.runtime.offload import Card
from helios_cp.sampling.denoise import Step, denoise
from helios_cp.sampling.state import ChunkState, split_history
from helios_cp.weights.check import check_execution
from helios_cp.weights.load import load_scheduler, load_text_encoder, load_vae, resolve
from helios_cp.weights.transformer import AdapterState, load_adaptable

Measure = Callable[[str], AbstractContextManager]  # measures the memory of a named work, which runs inside


@dataclass(eq=False, repr=False)
class Pipeline:
    """A loaded checkpoint that turns requests into videos, one chunk at a time.

    `prompt_encoder`, `codec`, `branches` and the transformer's `sequence` are what `pipeline.parallelize` exchanges to
    spread the work over ranks; every rank then runs `stream` with the same request. `device` is where the work is done,
    by default where the transformer is. `card` holds the weights that are offloaded, and `block_cache` is the one in
    the transformer; see `pipeline.prepare`. `adapters` can exchange the transformer's adapters, if its weights came
    from files. `decodes_beside` says whether a chunk is decoded beside the denoising of the next, which takes the
    memory of both at once. `None` leaves it to the device: one without streams decodes in turn, and a card too while it
    is not measured that both fit.
    """

    checkpoint: Checkpoint
    transformer: HeliosTransformer
    prompt_encoder: PromptEncoder
    codec: Codec
    scheduler: Any
    branches: Branches = field(default_factory=Branches)
    device: torch.device | None = None
    card: Card | None = None
    block_cache: BlockCache | None = None
    adapters: AdapterState | None = None
    decodes_beside: bool | None = None

    def __post_init__(self) -> None:
        self.device = self.device or self.transformer.device
        self.room = Room(MemoryMeter(self.device))
        self._offloaded: dict[Hashable, dict[str, int]] = {}
        self._base: tuple[Adapter, ...] = () if self.adapters is None else self.adapters.current or ()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Checkpoint,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        cache: Path | None = None,
        execution: Execution | None = None,
    ) -> Pipeline:
        """Load a preset, a folder in the diffusers layout or a hub id onto one device; the VAE stays in fp32.

        Raises `RequestError` for an `execution` that does not go together, or not on this device.
        """
        checkpoint = model if isinstance(model, Checkpoint) else resolve(model, cache)
        device = torch.device(device)
        execution = check_execution(checkpoint, execution or Execution(), device, dtype)
        make_current(device)
        home = execution.home(device)
        transformer, adapters = load_adaptable(checkpoint, dtype, device, execution)
        encoder = PromptEncoder(*load_text_encoder(checkpoint, home, dtype), device)
        codec = Codec(load_vae(checkpoint, home), execution)
        card, block_cache = prepare_parts(execution, transformer, codec.vae, encoder.text_encoder, device)
        return cls(
            checkpoint,
            transformer,
            encoder,
            codec,
            load_scheduler(checkpoint),
            device=device,
            card=card,
            block_cache=block_cache,
            adapters=adapters,
        )

    def set_adapters(self, adapters: Iterable[Adapter]) -> None:
        """Run with these adapters alone from the next request on, unless that has its own; `[]` gives the checkpoint.

        The result has the bits of a fresh load; every rank calls it. Raises `RequestError` for adapters that do not
        fit, before anything is changed. `helios_cp.weights.transformer.AdapterState` says what it costs.
        """
        adapters = tuple(adapters)
        self._exchange(adapters)
        self._base = adapters

    def _adapt(self, request: Request) -> None:
        """Have the weights be those of a request; another one may have been made meanwhile."""
        self._exchange(self._base if request.lora is None else request.lora)

    def _exchange(self, adapters: tuple[Adapter, ...]) -> None:
        if self.adapters is None and adapters:
            raise RequestError(f"--lora {adapters[0].path}: these weights came from no file, so none can be merged")
        if self.adapters is not None and adapters != self.adapters.current:
            moved = {} if self.card is None else self.card.resting(self.transformer)
            self.adapters.exchange(adapters, moved)

    @torch.no_grad()
    def stream(
        self,
        request: Request,
        inputs: Inputs | None = None,
        *,
        state: ChunkState | None = None,
        output_type: str = "uint8",
        on_step: Callable[[Step], None] | None = None,
    ) -> Iterator[Chunk]:
        """Yield each chunk as soon as it is denoised and decoded; nothing of earlier chunks is kept.

        Frames come to the host. An accelerator makes those of a chunk beside the denoising of the next, between two
        steps of which they come (`pipeline.decoding`); those of the first chunk of a size in turn, to measure whether
        both fit. They lie in pinned memory, which is used again once they are dropped. `state` goes on from a saved
        chunk. `on_step` is called after every step. Raises `RequestError` for a bad request before any work is done.
        """
        if output_type not in OUTPUT_TYPES:
            raise RequestError(f"output_type {output_type!r}: allowed are {', '.join(OUTPUT_TYPES)}")
        request, inputs = (inputs or Inputs()).merged(request)
        request = request.resolve(self.checkpoint)
        size = (request.batch_size, *request.latent_size, request.max_sequence_length, output_type)
        if self.card is not None:
            self.card.expect(self._offloaded.get(size, {}))
        watch = Stopwatch(self.device)
        with watch.measure("text"):
            first = first_entry(request, state.index if state is not None else 0)
            prompts = self.encode_prompts(request, inputs, first)
        if state is None:
            with watch.measure("media"):
                state = self.initial_state(request, inputs)
        may_be_beside = output_type != "latent" and self._decodes_alone
        decode_chunk = None
        if output_type != "latent":
            decode_chunk = functools.partial(self.codec.decode, output_type=output_type)
            if request.match_seams:
                decode_chunk = SeamMatcher(decode_chunk, state.chunk_before(request.num_latent_frames_per_chunk))
        side = self._side if may_be_beside else None
        measured = contextlib.nullcontext
        if may_be_beside and self.decodes_beside is None and self.codec.vae is not None:
            measured = functools.partial(self.room.measured, size)

        def decode(denoised: Denoised) -> Chunk:
            with measured("decode"):
                chunk = add_frames(denoised, decode_chunk, self.device, side)
            if self.card is not None and size not in self._offloaded:
                self._offloaded[size] = self.card.measured()
                self.card.expect(self._offloaded[size])
            return chunk

        events = self._events(request, inputs, prompts, state, watch, measured)
        yield from with_frames(events, decode, lambda: may_be_beside and self._is_beside(size), on_step)

    @torch.no_grad()
    def denoise(
        self, request: Request, inputs: Inputs, prompts: Prompts, state: ChunkState
    ) -> tuple[Tensor, ChunkState]:
        """One chunk alone, as `stream` makes it: its latents `[B, C, T, h, w]` in fp32, and the next chunk's state.

        `request` and `inputs` are resolved and merged, `prompts` those of `encode_prompts`.
        """
        events = self._steps(request, inputs, prompts, state, copy.deepcopy(self.scheduler), Stopwatch(self.device))
        *_, (latents, following) = events
        return latents.float(), following

    def encode_prompts(self, request: Request, inputs: Inputs | None = None, first: int = 0) -> Prompts:
        """Text conditions of a resolved request; of its schedule, if it has one, from entry `first` on."""
        self._adapt(request)
        inputs = inputs or Inputs()
        length, dtype = request.max_sequence_length, self.transformer.dtype
        embeds, negative = inputs.prompt_embeds, None
        if embeds is None:
            embeds = self.prompt_encoder(texts_from(request, first), length, dtype)
        if SamplingPlan.of(request, self.checkpoint).is_guided:
            negative = inputs.negative_prompt_embeds
            if negative is None:
                negative = self.prompt_encoder([request.negative_prompt], length, dtype)
            negative = negative.to(self.device, dtype).expand(request.batch_size, -1, -1)
        return Prompts(self.transformer, self.branches, request, embeds.to(self.device, dtype), negative, first)

    def initial_state(self, request: Request, inputs: Inputs | None = None) -> ChunkState:
        """The state before chunk 0 of a resolved request: encodes the picture or clip, if there is one."""
        inputs = inputs or Inputs()
        videos, hidden = pixels_to_encode(request, inputs)
        posteriors = self.codec.encode(videos)
        channels = self.checkpoint.transformer.in_channels
        return initial_state(request, inputs, self.codec, posteriors, hidden, channels, self.device)

    def _events(
        self, request: Request, inputs: Inputs, prompts: Prompts, state: ChunkState, watch: Stopwatch, measured: Measure
    ) -> Iterator[Step | Denoised]:
        """The steps of each chunk, followed by the chunk without its frames."""
        pace, scheduler = Pace(self.device), copy.deepcopy(self.scheduler)
        for index in range(state.index, request.num_chunks):
            for event in self._steps(request, inputs, prompts, state, scheduler, watch, measured):
                if isinstance(event, Step):
                    pace.step()
                    yield event
                else:
                    latents, state = event
            skipped = () if self.block_cache is None else tuple(self.block_cache.skipped)
            chunk = Chunk(index, latents.float(), None, state, {}, skipped)
            yield Denoised(chunk, watch.take(), make_mark(self.device))

    def _steps(
        self,
        request: Request,
        inputs: Inputs,
        prompts: Prompts,
        state: ChunkState,
        scheduler: Any,
        watch: Stopwatch,
        measured: Measure = contextlib.nullcontext,
    ) -> Iterator[Step | tuple[Tensor, ChunkState]]:
        """Each step of the chunk that `state` starts. Last its latents `[B, C, T, h, w]` and the next chunk's state.

        `scheduler` is changed. `watch` times the stages, and `measured` notes the memory that the denoising takes.
        """
        self._adapt(request)
        if self.block_cache is not None:
            self.block_cache.start_chunk()
        with watch.measure("conditions"):
            texts = prompts.at(state.index)

        def predict(latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor | None]:
            own = [self.transformer(latents, timestep, text, history, frame_indices) for text in texts]
            return self.branches.exchange(own) if plan.is_guided else (own[0], None)

        with measured("denoise"):
            plan = SamplingPlan.of(request, self.checkpoint)
            generators = state.make_generators()
            channels = self.checkpoint.transformer.in_channels
            noise = initial_noise(request, inputs, state, generators, channels, self.device)
            with watch.measure("conditions"):
                history, frame_indices = split_history(state, request)
                history = self.transformer.encode_history(history)
            events = denoise(
                noise,
                predict,
                plan,
                scheduler,
                generators,
                chunk=state.index,
                dtype=self.transformer.dtype,
                measure=watch.measure,
            )
            for event in events:
                if isinstance(event, Step):
                    yield event
                else:
                    yield event, state.after(event, generators, request, anchored=inputs.has_anchor)

    @property
    def peak_bytes(self) -> int:
        """Most bytes on the device at once so far."""
        meter = self.room.meter if self.card is None or self.card.meter is None else self.card.meter
        return meter.largest

    @property
    def _decodes_alone(self) -> bool:
        """Whether this rank decodes without other ranks and with its weights in place, or other ranks decode for it."""
        return self.card is None and (self.codec.vae is None or self.codec.is_local)

    def _is_beside(self, size: Hashable) -> bool:
        """Whether a chunk that may be decoded beside the denoising of the next is."""
        if self.decodes_beside is not None:
            return self.decodes_beside
        return has_streams(self.device) and (self.codec.vae is None or self.room.has_both(size))

    @functools.cached_property
    def _side(self) -> torch.Stream | None:
        """The stream that decodes, where the device has streams.

        One for all chunks, as torch keeps the memory that was freed on a stream for that stream alone.
        """
        return torch.Stream(self.device) if has_streams(self.device) else None
