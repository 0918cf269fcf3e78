"""The branches of guidance, and the embedded prompts with the cross-attention keys and values of each chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from helios_cp.config.request import Request
from helios_cp.model.transformer import HeliosTransformer, TextCondition
from helios_cp.pipeline.schedule import PromptBlend, prompt_blend


class Branches:
    """The two branches of guidance, both on this rank: that of the prompt (0) and that of the negative prompt (1)."""

    own: tuple[int, ...] = (0, 1)

    def exchange(self, velocities: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The velocities of both branches, from those of this rank's."""
        prompt, negative = velocities
        return prompt, negative


class Prompts:
    """The embedded prompts of a request; computes the conditions of a chunk, again only when the prompt changes."""

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
        self.negative = transformer.encode_text(negative) if 1 in self.branches else None
        self._current: tuple[object, TextCondition] | None = None

    def at(self, chunk: int) -> list[TextCondition]:
        """Cross-attention keys and values of a chunk, one a branch of this rank."""
        return [self._prompt(chunk) if branch == 0 else self.negative for branch in self.branches]

    def _prompt(self, chunk: int) -> TextCondition:
        key = None
        if self.request.prompt_schedule:
            lengths = tuple(entry.chunks for entry in self.request.prompt_schedule)
            key = prompt_blend(lengths, self.request.interpolation_steps, chunk)
        if self._current is None or self._current[0] != key:
            self._current = None  # the old keys and values go before the new ones are made
            self._current = (key, self.transformer.encode_text(self._embedding(key)))
        return self._current[1]

    def _embedding(self, key: PromptBlend | None) -> Tensor:
        if key is None:
            return self.embeds
        first, second = key.index_a, key.index_b
        return torch.lerp(self.embeds[first : first + 1], self.embeds[second : second + 1], key.weight)
