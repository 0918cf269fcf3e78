"""How a video starts: from nothing, from a picture, or from a clip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from helios_cp.config.errors import RequestError
from helios_cp.config.request import Request
from helios_cp.device.streams import to_device
from helios_cp.files.given import clip_ends, to_image_tensor
from helios_cp.model.codec import Codec
from helios_cp.sampling.noise import make_generators, normal
from helios_cp.sampling.state import ChunkState, generator_states


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
        has_recent = self.fake_image_latents is not None or self.video_latents is not None
        if inputs.image is None and has_recent != (self.image_latents is not None):
            if has_recent:
                raise RequestError("image_latents, those of the first frame, are needed beside the latents given")
            raise RequestError("image_latents: fake_image_latents or video_latents is needed beside it")
        return request, inputs

    @property
    def has_anchor(self) -> bool:
        return any(value is not None for value in (self.image, self.video, self.image_latents))


def pixels_to_encode(request: Request, inputs: Inputs) -> tuple[list[Tensor], int]:
    """What the VAE has to encode for a resolved request, each `[1, 3, T, H, W]` in [−1, 1].

    For a picture: the picture, and the same repeated for 33 frames. For a clip: its frame 0, and those chunks of 33
    frames at its end that reach into the history; with it the number of chunks before those, which need no encoding.
    Raises `RequestError` for a clip that is too short.
    """
    if inputs.video is not None and inputs.video_latents is None:
        size = request.frames_per_chunk
        seen = math.ceil(sum(request.history_frames) / request.num_latent_frames_per_chunk)
        ends = clip_ends(inputs.video, request.height, request.width, seen * size, request.resize_mode)
        count = ends.count // size
        if count == 0:
            raise RequestError(f"--video: {ends.count} frames; at least {size} are needed")
        seen = min(count, seen)
        return [ends.first, *ends.last[:, :, -seen * size :].split(size, dim=2)], count - seen
    if inputs.image is not None:
        image = to_image_tensor(inputs.image, request.height, request.width, request.resize_mode).unsqueeze(2)
        return [image, image.expand(-1, -1, request.frames_per_chunk, -1, -1)], 0
    return [], 0


def initial_state(
    request: Request,
    inputs: Inputs,
    codec: Codec,
    posteriors: Sequence,
    hidden: int,
    channels: int,
    device: torch.device,
) -> ChunkState:
    """The state before chunk 0 of a resolved request.

    `posteriors` and `hidden` are what came of `pixels_to_encode`. Draws, in diffusers' order and from each sample's own
    generator: posterior samples of the picture or clip, then the conditioning noise. `channels` is that of latents.
    """
    generators = make_generators(request.seeds)
    if inputs.video is not None or inputs.video_latents is not None:
        starts = [_from_video(request, inputs, codec, posteriors, hidden, generator) for generator in generators]
    elif inputs.image is not None or inputs.image_latents is not None:
        starts = [_from_image(request, inputs, codec, posteriors, generator) for generator in generators]
    else:
        starts = [(None, None) for _ in generators]
    frames = sum(request.history_frames)
    shape = (1, channels, frames, *request.latent_size)
    history = torch.cat([_left_fill(recent, frames, shape) for _, recent in starts])
    anchor = None
    if request.keep_first_frame:
        blank = torch.zeros(1, channels, 1, *request.latent_size)
        anchor = torch.cat([blank if first is None else first for first, _ in starts]).to(device)
    return ChunkState(0, history.to(device), anchor, generator_states(generators))


def initial_noise(
    request: Request,
    inputs: Inputs,
    state: ChunkState,
    generators: Sequence[torch.Generator],
    channels: int,
    device: torch.device,
) -> Tensor:
    """The noise `[B, C, T, h, w]` in fp32 that the next chunk is denoised from."""
    frames = request.num_latent_frames_per_chunk
    if inputs.latents is None:
        return normal((channels, frames, *request.latent_size), generators, device)
    return to_device(inputs.latents[:, :, state.index * frames :][:, :, :frames].float(), device)


def _from_image(
    request: Request, inputs: Inputs, codec: Codec, posteriors: Sequence, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Anchor `[1, C, 1, h, w]` and recent latent frames `[1, C, 1, h, w]`: the last of the repeated picture."""
    anchor, repeated = inputs.image_latents, inputs.fake_image_latents
    if anchor is None:
        anchor = codec.draw(posteriors[0], generator)
    if repeated is None:
        repeated = codec.draw(posteriors[1], generator)[:, :, -1:]
    if request.add_noise_to_image_latents:
        anchor = _add_noise(anchor, request, "image", generator)
        repeated = _add_noise(repeated, request, "video", generator)
    return anchor, repeated


def _from_video(
    request: Request, inputs: Inputs, codec: Codec, posteriors: Sequence, hidden: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Anchor `[1, C, 1, h, w]`, which is frame 0, and recent latent frames `[1, C, T, h, w]`.

    The random numbers of chunks that were not encoded are drawn all the same, so that the result does not change.
    """
    per_chunk = request.num_latent_frames_per_chunk
    if inputs.video_latents is None:
        anchor = codec.draw(posteriors[0], generator)
        shape = (1, anchor.shape[1], per_chunk, *request.latent_size)
        for _ in range(hidden):
            torch.randn(shape, generator=generator)
        chunks = [anchor.new_zeros(shape)] * hidden
        chunks += [codec.draw(posterior, generator) for posterior in posteriors[1:]]
    else:
        anchor, chunks = inputs.image_latents, list(inputs.video_latents.split(per_chunk, dim=2))
    if request.add_noise_to_video_latents:
        anchor = _add_noise(anchor, request, "image", generator)
        chunks = [_add_noise(chunk, request, "video", generator) for chunk in chunks]
    return anchor, torch.cat(chunks, dim=2)


def _add_noise(latents: Tensor, request: Request, kind: str, generator: torch.Generator) -> Tensor:
    """σ·ε + (1 − σ)·x with a σ for each frame, uniform between the bounds of an "image" or a "video"."""
    low, high = (getattr(request, f"{kind}_noise_sigma_{end}") for end in ("min", "max"))
    sigma = torch.rand(latents.shape[2], generator=generator) * (high - low) + low
    sigma = sigma.view(1, 1, -1, 1, 1).to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    return sigma * noise + (1 - sigma) * latents


def _left_fill(recent: Tensor | None, frames: int, shape: Sequence[int]) -> Tensor:
    """The last `frames` latent frames, zeros before them where there are fewer."""
    if recent is None:
        return torch.zeros(shape)
    recent = recent[:, :, -frames:].float()
    missing = recent.new_zeros(*recent.shape[:2], frames - recent.shape[2], *recent.shape[3:])
    return torch.cat([missing, recent], dim=2)
