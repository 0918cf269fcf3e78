"""The branches of guidance, and the cross-attention keys and values of each chunk's prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from helios_cp.config.request import Request
from helios_cp.model.conditions import TextCondition
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.pipeline.prompt_mix import Mix, prompt_mix


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
