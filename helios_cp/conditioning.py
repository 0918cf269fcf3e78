"""How a video starts: from nothing, from a picture, or from a clip."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from helios_cp import vae as codec
from helios_cp.config import Request, RequestError
from helios_cp.media import to_image_tensor, to_video_tensor
from helios_cp.noise import make_generators
from helios_cp.state import ChunkState, generator_states


@dataclass(frozen=True)
class Inputs:
    """What Python callers may hand over in place of the paths and prompts of a request.

    `image`: a path, PIL image or array; `video`: a path, list of PIL images or array. `prompt_embeds` and
    `negative_prompt_embeds`: `[B, L, text_dim]`. `image_latents` `[1, C, 1, h, w]` with `fake_image_latents`, the last
    latent frame of the repeated picture, in the same shape; or `image_latents` (first frame) with `video_latents`
    `[1, C, 9n, h, w]`. `latents`: initial noise `[B, C, 9·chunks, h, w]` in place of the seeds'.
    """

    image: Any = None
    video: Any = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    image_latents: Tensor | None = None
    fake_image_latents: Tensor | None = None
    video_latents: Tensor | None = None
    latents: Tensor | None = None

    def merged(self, request: Request) -> tuple[Request, Inputs]:
        """Move media and embeddings to where they are looked for; raises `RequestError` for what does not fit."""
        if self.prompt_embeds is not None:
            if request.prompt or request.prompt_schedule:
                raise RequestError("prompt and prompt_embeds: give one of the two")
            names = tuple(f"embedding {i}" for i in range(self.prompt_embeds.shape[0]))
            request = replace(request, prompt=names)
        inputs = replace(
            self,
            image=request.image if self.image is None else self.image,
            video=request.video if self.video is None else self.video,
        )
        if inputs.image is not None and inputs.video is not None:
            raise RequestError("--image and --video: give one of the two")
        inputs._check_latents()
        return request, inputs

    def _check_latents(self) -> None:
        if self.image is not None:
            return
        if self.image_latents is None:
            if self.fake_image_latents is not None or self.video_latents is not None:
                raise RequestError("image_latents, those of the first frame, are needed beside the latents given")
        elif self.fake_image_latents is None and self.video_latents is None:
            raise RequestError("image_latents: fake_image_latents or video_latents is needed beside it")

    @property
    def has_anchor(self) -> bool:
        return any(value is not None for value in (self.image, self.video, self.image_latents))


def initial_state(request: Request, inputs: Inputs, vae, channels: int, device: torch.device) -> ChunkState:
    """The state before chunk 0 of a resolved request.

    Draws, in diffusers' order and from each sample's own generator: posterior samples of the picture or clip, then
    the conditioning noise. `channels` is the number of latent channels.
    """
    generators = make_generators(request.seeds)
    draw = _start(request, inputs, vae)
    starts = [draw(generator) for generator in generators]
    frames = sum(request.history_frames)
    shape = (1, channels, frames, *request.latent_size)
    history = torch.cat([_left_fill(recent, frames, shape) for _, recent in starts])
    anchor = None
    if request.keep_first_frame:
        blank = torch.zeros(1, channels, 1, *request.latent_size)
        anchor = torch.cat([blank if first is None else first for first, _ in starts]).to(device)
    return ChunkState(0, history.to(device), anchor, generator_states(generators))


Draw = Callable[[torch.Generator], tuple[Tensor | None, Tensor | None]]
"""Draws one sample's anchor `[1, C, 1, h, w]` and recent latent frames `[1, C, T, h, w]`; `None` stands for zeros."""


def _start(request: Request, inputs: Inputs, vae) -> Draw:
    if inputs.video is not None or inputs.video_latents is not None:
        return _from_video(request, inputs, vae)
    if inputs.image is not None or inputs.image_latents is not None:
        return _from_image(request, inputs, vae)
    return lambda generator: (None, None)


def _from_image(request: Request, inputs: Inputs, vae) -> Draw:
    still = None
    if inputs.image is not None:
        image = to_image_tensor(inputs.image, request.height, request.width).unsqueeze(2)
        picture = codec.encode(vae, image)
        still = codec.encode(vae, image.expand(-1, -1, request.frames_per_chunk, -1, -1))

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        anchor, repeated = inputs.image_latents, inputs.fake_image_latents
        if anchor is None:
            anchor = codec.sample(vae, picture, generator)
        if repeated is None:
            repeated = codec.sample(vae, still, generator)[:, :, -1:]
        if request.add_noise_to_image_latents:
            anchor = _add_noise(anchor, 1, _image_range(request), generator)
            repeated = _add_noise(repeated, 1, _video_range(request), generator)
        return anchor, repeated

    return draw


def _from_video(request: Request, inputs: Inputs, vae) -> Draw:
    """Frame 0 is the anchor; the chunks of 33 frames that the clip's end holds are the history.

    Only the last of them reach into the history. Those before are not encoded, but their random numbers are drawn all
    the same, so that the result does not change.
    """
    per_chunk = request.num_latent_frames_per_chunk
    hidden, posteriors = 0, []
    if inputs.video_latents is None:
        video = to_video_tensor(inputs.video, request.height, request.width)
        size = request.frames_per_chunk
        count = video.shape[2] // size
        if count == 0:
            raise RequestError(f"--video: {video.shape[2]} frames; at least {size} are needed")
        visible = min(count, math.ceil(sum(request.history_frames) / per_chunk))
        hidden = count - visible
        first = codec.encode(vae, video[:, :, :1])
        clips = video[:, :, -visible * size :].split(size, dim=2)
        posteriors = [codec.encode(vae, clip) for clip in clips]

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if inputs.video_latents is None:
            anchor = codec.sample(vae, first, generator)
            shape = (1, anchor.shape[1], per_chunk, *request.latent_size)
            for _ in range(hidden):
                torch.randn(shape, generator=generator)
            chunks = [anchor.new_zeros(shape)] * hidden
            chunks += [codec.sample(vae, posterior, generator) for posterior in posteriors]
        else:
            anchor, chunks = inputs.image_latents, list(inputs.video_latents.split(per_chunk, dim=2))
        if request.add_noise_to_video_latents:
            anchor = _add_noise(anchor, 1, _image_range(request), generator)
            chunks = [_add_noise(chunk, chunk.shape[2], _video_range(request), generator) for chunk in chunks]
        return anchor, torch.cat(chunks, dim=2)

    return draw


def _image_range(request: Request) -> tuple[float, float]:
    return request.image_noise_sigma_min, request.image_noise_sigma_max


def _video_range(request: Request) -> tuple[float, float]:
    return request.video_noise_sigma_min, request.video_noise_sigma_max


def _add_noise(latents: Tensor, sigmas: int, bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    """σ·ε + (1 − σ)·x with σ uniform in `bounds`: one σ for all frames, or `sigmas` = T of them, one a frame."""
    low, high = bounds
    sigma = (torch.rand(sigmas, generator=generator) * (high - low) + low).view(1, 1, -1, 1, 1).to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    return sigma * noise + (1 - sigma) * latents


def _left_fill(recent: Tensor | None, frames: int, shape: Sequence[int]) -> Tensor:
    """The last `frames` latent frames, zeros before them where there are fewer."""
    if recent is None:
        return torch.zeros(shape)
    recent = recent[:, :, -frames:].float()
    missing = recent.new_zeros(*recent.shape[:2], frames - recent.shape[2], *recent.shape[3:])
    return torch.cat([missing, recent], dim=2)
