"""How the prompts of a schedule mix in each chunk."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from helios_cp.config.request import Request, ScheduledPrompt

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
