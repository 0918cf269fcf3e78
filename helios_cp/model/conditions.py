"""What a forward is conditioned on, computed beforehand: the text once per prompt, the history once per chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class TextCondition:
    """Cross-attention keys and values `[B, L, H, D]` of a prompt, one pair a block.

    `number` tells texts apart that take turns in every step. `token` is this condition's own, whatever its values.
    """

    keys_values: tuple[tuple[Tensor, Tensor], ...]
    number: int = 0
    token: object = field(default_factory=object, compare=False, repr=False)

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for pair in self.keys_values for tensor in pair]

    def map(self, function: Callable[[Tensor], Tensor]) -> TextCondition:
        """Another condition, whose tensors are what a function makes of these."""
        return TextCondition(tuple((function(key), function(value)) for key, value in self.keys_values), self.number)


@dataclass(frozen=True)
class History:
    """Latent frames that a chunk continues, `[B, C, T, h, w]` each, with the frame indices of the rotary tables.

    `short` begins with the anchor frame, if there is one. `mid` and `long` need `short`, whose grid they share.
    """

    short: Tensor
    short_indices: tuple[int, ...]
    mid: Tensor | None = None
    mid_indices: tuple[int, ...] = ()
    long: Tensor | None = None
    long_indices: tuple[int, ...] = ()


@dataclass(frozen=True)
class HistoryCondition:
    """Embedded history `[B, S, dim]` in the order long · mid · short, and its rotary table `[S, D/2]`.

    `lengths` are the tokens of each part in the whole sequence; S is fewer where the sequence is sharded. `token` as in
    `TextCondition`.
    """

    tokens: Tensor
    rotary: Tensor
    lengths: tuple[int, ...]
    token: object = field(default_factory=object, compare=False, repr=False)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.tokens, self.rotary]

    def map(self, function: Callable[[Tensor], Tensor]) -> HistoryCondition:
        """Another condition, whose tensors are what a function makes of these."""
        return HistoryCondition(function(self.tokens), function(self.rotary), self.lengths)
