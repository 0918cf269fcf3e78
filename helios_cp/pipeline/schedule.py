"""Which prompt holds in which chunk of an interactive video. Pure arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple


class PromptBlend(NamedTuple):
    """`(1 − weight) · embedding[index_a] + weight · embedding[index_b]`.

    Where one prompt holds alone, both indices are its own and the weight is 1, so that equal blends compare equal.
    """

    index_a: int
    index_b: int
    weight: float


def prompt_blend(lengths: Sequence[int], interpolation_steps: int, chunk: int) -> PromptBlend:
    """How the prompts of a schedule mix in a chunk.

    `lengths` are the chunks each entry lasts; the last entry holds for all chunks to come. In the first
    `interpolation_steps` chunks of every entry but the first, the weight of the new prompt goes linearly from 0 to 1,
    both included. A single step has weight 0: the old prompt for one chunk more. An entry that is shorter breaks its
    blend off, and the next one starts from its prompt alone.

    Raises `ValueError` for an empty schedule, a length or `interpolation_steps` below 1, or a negative chunk.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"prompt schedule {list(lengths)}: one entry or more, of at least 1 chunk each, is allowed")
    if interpolation_steps < 1:
        raise ValueError(f"interpolation_steps {interpolation_steps}: at least 1 is allowed")
    if chunk < 0:
        raise ValueError(f"chunk {chunk}: at least 0 is allowed")
    starts = [0, *accumulate(lengths)][:-1]
    entry = max(index for index, start in enumerate(starts) if start <= chunk)
    position = chunk - starts[entry]
    if entry == 0 or position >= max(interpolation_steps - 1, 1):
        return PromptBlend(entry, entry, 1.0)
    if position == 0:
        return PromptBlend(entry - 1, entry - 1, 1.0)
    return PromptBlend(entry - 1, entry, position / (interpolation_steps - 1))
