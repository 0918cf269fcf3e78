"""How a sequence made of several segments is cut over ranks, as arithmetic on integers.

Segments are laid end to end, such as history tokens followed by noisy tokens. Contiguous shards of the whole would
leave one rank with many noisy tokens and another with few, so each segment is cut on its own. Nothing is padded: parts
are uneven where the numbers do not divide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


def split(total: int, parts: int, first: int = 0) -> tuple[int, ...]:
    """`total` things in `parts` sizes that differ by at most 1, in rank order.

    The surplus goes one each to the ranks from `first` on, cyclically. Raises `ValueError` for a negative total or for
    no parts.
    """
    if total < 0 or parts < 1:
        raise ValueError(f"split({total}, {parts}): allowed are a total of at least 0 and at least 1 part")
    size, surplus = divmod(total, parts)
    return tuple(size + ((rank - first) % parts < surplus) for rank in range(parts))


@dataclass(frozen=True)
class SegmentPlan:
    """Consecutive segments of `lengths` tokens, each cut over `ranks`.

    A rank's local order is [part of segment 0 | part of segment 1 | …]. The surplus of one segment goes to the ranks
    after those that took the surplus of the segment before, so that local totals also differ by at most 1; `first` is
    the rank at which this begins.
    """

    lengths: tuple[int, ...]
    ranks: int
    first: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 0 or self.ranks < 1:
            raise ValueError(
                f"segments {self.lengths} over {self.ranks} ranks: allowed are one or more lengths of at least 0 and "
                "at least 1 rank"
            )

    @property
    def total(self) -> int:
        """Tokens of the whole sequence."""
        return sum(self.lengths)

    def _first(self, segment: int) -> int:
        return (self.first + sum(self.lengths[:segment])) % self.ranks

    def segment_sizes(self, segment: int) -> tuple[int, ...]:
        """Tokens of one segment on each rank."""
        return split(self.lengths[segment], self.ranks, self._first(segment))

    def sizes(self, rank: int) -> tuple[int, ...]:
        """Tokens of each segment on one rank."""
        return tuple(self.segment_sizes(segment)[rank] for segment in range(len(self.lengths)))

    @property
    def local_lengths(self) -> tuple[int, ...]:
        """Tokens of all segments together on each rank: what the attention of a group needs to know."""
        return tuple(map(sum, zip(*map(self.segment_sizes, range(len(self.lengths))), strict=True)))

    def only(self, segment: int) -> SegmentPlan:
        """The same cut of one segment alone, as when only the noisy outputs are gathered."""
        return SegmentPlan((self.lengths[segment],), self.ranks, self._first(segment))

    def shard(self, tensor: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
        """A rank's local tokens out of the whole sequence along `dim`; a view where there is one segment."""
        self._check(tensor, dim, self.total)
        segments = tensor.split(self.lengths, dim)
        parts = [whole.split(self.segment_sizes(segment), dim)[rank] for segment, whole in enumerate(segments)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def unshard(self, parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        """The whole sequence out of the local tokens of all ranks, given in rank order: the inverse of `shard`."""
        if len(parts) != self.ranks:
            raise ValueError(f"unshard of {len(parts)} parts: this plan has {self.ranks} ranks; give one part a rank")
        for part, length in zip(parts, self.local_lengths, strict=True):
            self._check(part, dim, length)
        pieces = [part.split(self.sizes(rank), dim) for rank, part in enumerate(parts)]
        return torch.cat([piece for segment in zip(*pieces, strict=True) for piece in segment], dim)

    def _check(self, tensor: torch.Tensor, dim: int, length: int) -> None:
        if tensor.shape[dim] != length:
            raise ValueError(
                f"tensor of shape {tuple(tensor.shape)}: dim {dim} must have {length} tokens for segments "
                f"{self.lengths} over {self.ranks} ranks"
            )


def check_lengths(ranks: int, query_lengths: Sequence[int], key_lengths: Sequence[int]) -> None:
    """Raises `ValueError` unless there is one query and one key length for each rank."""
    if len(query_lengths) != ranks or len(key_lengths) != ranks:
        raise ValueError(
            f"attention over {ranks} ranks: {len(query_lengths)} query and {len(key_lengths)} key lengths are given; "
            "give one of each a rank"
        )


def check_local(
    rank: int, query_lengths: Sequence[int], key_lengths: Sequence[int], query: torch.Tensor, key: torch.Tensor
) -> None:
    """Raises `ValueError` unless this rank's query and key `[B, S_local, H, D]` have the tokens of the plan."""
    if query.shape[1] != query_lengths[rank] or key.shape[1] != key_lengths[rank]:
        raise ValueError(
            f"rank {rank} has {query.shape[1]} query and {key.shape[1]} key tokens, but the plan says "
            f"{query_lengths[rank]} and {key_lengths[rank]}"
        )
