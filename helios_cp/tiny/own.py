"""Training examples after chunks that the student made itself, as it will see them when it makes a video.

Such a past is off, and a chunk that leads back to the clip at once shows a seam. So its first frame should be off as
the last one of the past is, and those that follow by less and less.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from helios_cp.model.transformer import HeliosTransformer
from helios_cp.tiny.examples import Batch, Place, batch_of, draw_places, past_of
from helios_cp.tiny.forward import CHUNK, HISTORY, Past, embed_text
from helios_cp.tiny.latents import CHUNKS, Clips
from helios_cp.tiny.rollout import FewSteps

PASTS = ("true", "continued", "first")
"""What pasts end in: a chunk of the clip, or what the student made of the chunk before: after others, or of nothing."""


@dataclass(frozen=True)
class Continuation:
    """A batch, and how many frames of its clean latents should follow.

    A chunk that was made of nothing may go on anyhow, but its next frame looks like its last.
    """

    batch: Batch
    frames: int


def draw_continuation(
    sampler: FewSteps, student: HeliosTransformer, clips: Clips, text_encoder, generator: random.Random, count: int
) -> Continuation:
    """A batch that continues clips, with a kind of past."""
    kind = generator.choice(PASTS)
    places = [_at(place, kind) for place in draw_places(clips, generator, count, {"continued": 1.0})]
    batch = batch_of(clips, text_encoder, generator, places)
    if kind == "true":
        return Continuation(batch, CHUNK)
    device = batch.clean.device
    earlier = [
        replace(
            place,
            kind="text" if kind == "first" else place.kind,
            number=(place.number - 1) % CHUNKS,
            before=place.before - 1,
        )
        for place in places
    ]
    with torch.no_grad():
        text = embed_text(student, batch.states, batch.mask)
    past = past_of(clips, earlier, generator).to(device)
    made = sampler.chunk(student, torch.randn_like(batch.clean), text, past).float()
    true = torch.stack([clips.chunks[place.source, place.number, :, -1:] for place in earlier]).to(device)
    history = torch.cat([past.history, made], 2)[:, :, -HISTORY:]
    anchor = made[:, :, :1] if kind == "first" else past.anchor
    clean = batch.clean + _ramp(device) * (made[:, :, -1:] - true)
    return Continuation(replace(batch, clean=clean, past=Past(history, anchor)), 1 if kind == "first" else CHUNK)


def _at(place: Place, kind: str) -> Place:
    if kind == "first":
        return replace(place, number=1, before=1)
    return replace(place, before=max(2, place.before))


def _ramp(device: torch.device) -> Tensor:
    """1 at a chunk's first frame to 0 at its last, `[1, 1, 9, 1, 1]`."""
    return torch.linspace(1, 0, CHUNK, device=device).view(1, 1, -1, 1, 1)
