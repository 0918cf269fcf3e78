"""The chunks of one video, denoised one after the other by a loaded transformer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.request import Request
from helios_cp.config.sampling_plan import SamplingPlan
from helios_cp.device.timing import Stopwatch
from helios_cp.model.block_cache import BlockCache
from helios_cp.model.conditions import TextCondition
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.pipeline.prompts import Branches, Prompts
from helios_cp.pipeline.start import Inputs, initial_noise
from helios_cp.sampling.denoise import Step, denoise
from helios_cp.sampling.state import ChunkState, split_history


@dataclass
class ChunkDenoiser:
    """Denoises chunks of a resolved request. For each chunk call `encode_text`, then `steps`.

    `scheduler` is changed, so it belongs to this object alone. `watch` times the stages.
    """

    checkpoint: Checkpoint
    transformer: HeliosTransformer
    branches: Branches
    block_cache: BlockCache | None
    scheduler: Any
    device: torch.device
    watch: Stopwatch
    request: Request
    inputs: Inputs
    prompts: Prompts
    _texts: list[TextCondition] = field(default_factory=list)

    def encode_text(self, chunk: int) -> None:
        """Make keys and values of a chunk's prompt. Those of the chunk before go first, to save memory."""
        if self.block_cache is not None:
            self.block_cache.start_chunk()
        self._texts = []
        with self.watch.measure("conditions"):
            self._texts = self.prompts.at(chunk)

    def steps(self, state: ChunkState) -> Iterator[Step | tuple[Tensor, ChunkState]]:
        """Each step of the chunk that `state` starts. Last its latents `[B, C, T, h, w]` and the next chunk's state."""
        plan = SamplingPlan.of(self.request, self.checkpoint)
        generators = state.make_generators()
        channels = self.checkpoint.transformer.in_channels
        noise = initial_noise(self.request, self.inputs, state, generators, channels, self.device)
        with self.watch.measure("conditions"):
            history, frame_indices = split_history(state, self.request)
            history = self.transformer.encode_history(history)

        def predict(latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor | None]:
            own = [self.transformer(latents, timestep, text, history, frame_indices) for text in self._texts]
            return self.branches.exchange(own) if plan.is_guided else (own[0], None)

        events = denoise(
            noise,
            predict,
            plan,
            self.scheduler,
            generators,
            chunk=state.index,
            dtype=self.transformer.dtype,
            measure=self.watch.measure,
        )
        for event in events:
            if isinstance(event, Step):
                yield event
            else:
                yield event, state.after(event, generators, self.request, anchored=self.inputs.has_anchor)
