"""Training examples of the transformers: a chunk, what it continues, and its caption."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from helios_cp.tiny.captions import caption, disturbed
from helios_cp.tiny.forward import HISTORY, Past
from helios_cp.tiny.latents import CHUNKS, Clips
from helios_cp.tiny.text import tokenize

KINDS = {"text": 0.34, "image": 0.06, "continued": 0.54, "switched": 0.06}
"""How a chunk starts: from nothing, from a picture, after chunks of its clip, after those of another (a new prompt)."""
EMPTY_TEXT = 0.1
"""The share of examples without a caption, which guidance needs."""


CLEAN_PAST = 0.7
"""The share of pasts without noise."""


@dataclass(frozen=True)
class Batch:
    """`clean` `[B, C, 9, h, w]`, `subject` `[B, 1, 9, h, w]`, the past, and the text's states and mask `[B, L, …]`."""

    clean: Tensor
    subject: Tensor
    past: Past
    states: Tensor
    mask: Tensor
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """A chunk of a clip, by its number in the period, and what it continues: `before` chunks of the clip `source`."""

    kind: str
    clip: int
    number: int
    source: int
    before: int


def draw_batch(
    clips: Clips, text_encoder, generator: random.Random, count: int, *, kinds: dict[str, float] = KINDS
) -> Batch:
    """Some examples, on the device of the text encoder."""
    return batch_of(clips, text_encoder, generator, draw_places(clips, generator, count, kinds))


def batch_of(clips: Clips, text_encoder, generator: random.Random, places: list[Place]) -> Batch:
    """The examples at these places."""
    texts = []
    for place in places:
        text = disturbed(caption(clips.scenes[place.clip], generator)[0], generator)
        texts.append("" if generator.random() < EMPTY_TEXT else text)
    device = next(text_encoder.parameters()).device
    ids, mask = (value.to(device) for value in tokenize(texts))
    with torch.no_grad():
        states = text_encoder(ids, mask).last_hidden_state
    return Batch(
        torch.stack([clips.chunks[place.clip, place.number] for place in places]).to(device),
        torch.stack([clips.subject[place.clip, place.number] for place in places]).to(device),
        past_of(clips, places, generator).to(device),
        states,
        mask,
        tuple(place.kind for place in places),
    )


def draw_places(clips: Clips, generator: random.Random, count: int, kinds: dict[str, float]) -> list[Place]:
    """Some places, of the kinds with their weights."""
    places = []
    for kind in generator.choices(list(kinds), list(kinds.values()), k=count):
        clip = source = generator.randrange(len(clips.scenes))
        if kind in ("text", "image"):
            places.append(Place(kind, clip, 0, source, 0))
            continue
        if kind == "switched":
            source = generator.randrange(len(clips.scenes))
        before = generator.choice((1, 2, 3, 3))  # three chunks fill the history, so more look the same
        first = generator.randrange(CHUNKS) if before == 3 else 0
        places.append(Place(kind, clip, (first + before) % CHUNKS, source, before))
    return places


def past_of(clips: Clips, places: list[Place], generator: random.Random) -> Past:
    """What places continue, corrupted as training needs it."""
    channels, _, height, width = clips.chunks.shape[2:]
    history = torch.zeros(len(places), channels, HISTORY, height, width)
    anchor = torch.zeros(len(places), channels, 1, height, width)
    for index, place in enumerate(places):
        if place.kind == "text":
            continue
        first = place.number - place.before
        chunks = [clips.chunks[place.source, (first + i) % CHUNKS] for i in range(place.before)]
        recent = clips.stills[place.clip] if place.kind == "image" else torch.cat(chunks, 1)[:, -HISTORY:]
        history[index, :, HISTORY - recent.shape[1] :] = recent
        history[index] = corrupted(history[index], generator)
        anchor[index] = corrupted(clips.chunks[place.source, 0, :, :1], generator)
    return Past(history, anchor)


def corrupted(latents: Tensor, generator: random.Random) -> Tensor:
    """σ·ε + (1 − σ)·x with σ ~ U(0, 1/3) a frame, as Helios does to history; most stay clean, and so do zeros.

    So the model learns to go on from its own, imperfect frames. Noise also hides how light a frame was, by as much as a
    seam needs to be seen, so most of the pasts show what a sampler sees.
    """
    if generator.random() < CLEAN_PAST:
        return latents
    sigma = torch.rand(latents.shape[1]).view(1, -1, 1, 1) / 3
    is_blank = latents.abs().amax((0, 2, 3), keepdim=True) == 0
    return torch.where(is_blank, latents, sigma * torch.randn_like(latents) + (1 - sigma) * latents)
