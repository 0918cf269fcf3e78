"""How the prompts of a schedule mix in each chunk, and the cross-attention keys and values that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from helios_cp.config.request import Request, ScheduledPrompt
from helios_cp.model.conditions import TextCondition
from helios_cp.model.transformer import HeliosTransformer

Mix = tuple[tuple[int, float], ...]
"""Entries of a schedule by index, each with its share, above 0; the shares sum to 1. The newest entry comes last."""


def prompt_mix(schedule: Sequence[ScheduledPrompt], interpolation_steps: int, chunk: int) -> Mix:
    """What a chunk shows of a schedule; the last entry holds for all chunks to come.

    An entry with a transition of t chunks has the share min(1, (p + 1) / t) in its chunk p, counted from 0. The rest
    goes to what the chunk before the entry showed, so that an entry which breaks a transition off never jumps.

    An entry without one blends as in diffusers: in its first `interpolation_steps` chunks its share goes linearly from
    0 to 1, both included, and the rest goes to the entry before it alone. A single step has share 0: the old prompt for
    one chunk more. An entry that is shorter breaks its blend off, and the next one starts from its prompt alone.

    Raises `ValueError` for an empty schedule, a length or `interpolation_steps` below 1, or a negative chunk.
    """
    lengths = [entry.chunks for entry in schedule]
    if not lengths or min(lengths) < 1:
        raise ValueError(f"prompt schedule {lengths}: one entry or more, of at least 1 chunk each, is allowed")
    if interpolation_steps < 1:
        raise ValueError(f"interpolation_steps {interpolation_steps}: at least 1 is allowed")
    if chunk < 0:
        raise ValueError(f"chunk {chunk}: at least 0 is allowed")
    shown: Mix = ()
    for index, (start, end) in enumerate(pairwise([0, *accumulate(lengths)])):
        if start > chunk:
            break
        is_last = end > chunk or index + 1 == len(lengths)
        position = (chunk if is_last else end - 1) - start
        shown = _mix_of_entry(index, schedule[index].transition, position, shown, interpolation_steps)
    return shown


def _mix_of_entry(index: int, transition: int | None, position: int, before: Mix, interpolation_steps: int) -> Mix:
    """In chunk `position` of an entry; `before` is what the chunk before the entry showed."""
    if transition is not None:
        share, rest = min(1.0, (position + 1) / transition), before
    else:
        share, rest = position / max(interpolation_steps - 1, 1), ((index - 1, 1.0),)
    if index == 0 or share >= 1:
        return ((index, 1.0),)
    return (*((each, (1 - share) * old) for each, old in rest), *([(index, share)] if share else []))


def first_entry(request: Request, chunk: int) -> int:
    """The oldest entry of a request's schedule of which a chunk, or one after it, shows anything; 0 without one."""
    schedule = request.prompt_schedule
    return prompt_mix(schedule, request.interpolation_steps, chunk)[0][0] if schedule else 0


def texts_from(request: Request, first: int) -> tuple[str, ...]:
    """The texts to encode for a request: all prompts of a batch, or those of a schedule from entry `first` on."""
    return tuple(entry.prompt for entry in request.prompt_schedule[first:]) or request.prompt


class Branches:
    """The two branches of guidance, both on this rank: that of the prompt (0) and that of the negative prompt (1)."""

    own: tuple[int, ...] = (0, 1)

    def exchange(self, velocities: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The velocities of both branches, from those of this rank's."""
        prompt, negative = velocities
        return prompt, negative


class Prompts:
    """The embedded prompts of a request; computes the conditions of a chunk, again only when the prompt changes.

    `embeds` `[B, L, text_dim]` are of the prompts, or of a schedule's entries from `first` on. `negative` is `None`
    where nothing is guided: every rank then has the prompt's branch.
    """

    def __init__(
        self,
        transformer: HeliosTransformer,
        branches: Branches,
        request: Request,
        embeds: Tensor,
        negative: Tensor | None,
        first: int = 0,
    ) -> None:
        self.transformer = transformer
        self.request = request
        self.embeds = embeds
        self.first = first
        self.branches = branches.own if negative is not None else (0,)
        self._texts: dict[int, TextCondition] = {}
        self._key: object = ()
        if negative is not None:
            self._encode(negative, 1)

    def at(self, chunk: int) -> list[TextCondition]:
        """Cross-attention keys and values of a chunk, one a branch of this rank."""
        key = None
        if self.request.prompt_schedule:
            key = prompt_mix(self.request.prompt_schedule, self.request.interpolation_steps, chunk)
        if self._key != key:
            self._key = ()
            self._encode(self._embedding(key), 0)
            self._key = key
        return [self._texts[branch] for branch in self.branches]

    def _encode(self, embeds: Tensor, branch: int) -> None:
        """Keys and values of a branch, kept if it is this rank's.

        Every rank encodes both branches, as it takes all ranks to gather sharded weights.
        """
        self._texts.pop(branch, None)  # the old keys and values go before the new ones are made
        text = self.transformer.encode_text(embeds, branch)
        if branch in self.branches:
            self._texts[branch] = text

    def _embedding(self, mix: Mix | None) -> Tensor:
        if mix is None:
            return self.embeds
        parts = [self.embeds[index - self.first].unsqueeze(0) for index, _ in mix]
        if len(parts) == 1:
            return parts[0]
        if len(parts) == 2:  # as diffusers blends them, to the same bits
            return torch.lerp(*parts, mix[1][1])
        total = sum(share * part.float() for part, (_, share) in zip(parts, mix, strict=True))
        return total.to(self.embeds.dtype)
