"""The branches of guidance, and the cross-attention keys and values of each chunk's prompt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from helios_cp.config.request import Request
from helios_cp.model.transformer import HeliosTransformer, TextCondition


class Branches:
    """The two branches of guidance, both on this rank: that of the prompt (0) and that of the negative prompt (1)."""

    own: tuple[int, ...] = (0, 1)

    def exchange(self, velocities: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The velocities of both branches, from those of this rank's."""
        prompt, negative = velocities
        return prompt, negative


class Prompts:
    """The embedded prompts of a request; computes the conditions of a chunk, again only when the prompt changes.

    `negative` is `None` where nothing is guided: every rank then has the prompt's branch.
    """

    def __init__(
        self,
        transformer: HeliosTransformer,
        branches: Branches,
        request: Request,
        embeds: Tensor,
        negative: Tensor | None,
    ) -> None:
        self.transformer = transformer
        self.request = request
        self.embeds = embeds
        self.branches = branches.own if negative is not None else (0,)
        self._texts: dict[int, TextCondition] = {}
        self._key: object = ()
        if negative is not None:
            self._encode(negative, 1)

    def at(self, chunk: int) -> list[TextCondition]:
        """Cross-attention keys and values of a chunk, one a branch of this rank."""
        key = None
        if self.request.prompt_schedule:
            lengths = tuple(entry.chunks for entry in self.request.prompt_schedule)
            key = prompt_blend(lengths, self.request.interpolation_steps, chunk)
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

    def _embedding(self, key: PromptBlend | None) -> Tensor:
        if key is None:
            return self.embeds
        first, second = key.index_a, key.index_b
        return torch.lerp(self.embeds[first : first + 1], self.embeds[second : second + 1], key.weight)


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
