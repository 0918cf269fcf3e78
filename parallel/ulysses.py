"""Sequence-parallel attention by all-to-all: tokens are exchanged for heads, attended to, and exchanged back.

After one all-to-all of q, k and v packed together a rank holds all tokens of some heads, on which attention is local; a
second brings the result back (Jacobs et al., DeepSpeed Ulysses, arXiv 2309.14509). Heads and tokens may be uneven.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from parallel.attention import Attention, attend
from parallel.collectives import Group, pieces
from parallel.segments import check_lengths, check_local, split


@dataclass(eq=False)
class UlyssesAttention:
    """Attention over the tokens of a whole group, called with this rank's `[B, S_local, H, D]` and returning the same.

    `query_lengths` and `key_lengths` are the token counts of every rank, which may differ from each other where only
    some local tokens ask. `attention` runs on all tokens and this rank's heads. Two collectives a call, none in a group
    of one. Raises `ValueError` for more ranks than heads or for tokens that do not follow the plan.
    """

    group: Group
    query_lengths: Sequence[int]
    key_lengths: Sequence[int]
    attention: Attention = attend

    def __post_init__(self) -> None:
        check_lengths(self.group.size, self.query_lengths, self.key_lengths)

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        check_local(self.group.rank, self.query_lengths, self.key_lengths, query, key)
        if self.group.size == 1:
            return self.attention(query, key, value)
        heads = split(query.shape[2], self.group.size)
        if min(heads) == 0:
            raise ValueError(
                f"Ulysses over {self.group.size} ranks: at most {query.shape[2]} ranks are allowed, one head each"
            )
        return self._to_tokens(self.attention(*self._to_heads(query, key, value, heads)), heads)

    def _to_heads(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: Sequence[int]
    ) -> list[torch.Tensor]:
        """q, k, v of some tokens and all heads → of all tokens and this rank's heads, in one message to each rank."""
        batch, _, _, dim = query.shape
        tokens = query.shape[1] + 2 * key.shape[1]
        own = heads[self.group.rank]
        sent = _pack_heads((query, key, value), heads)
        received = self.group.all_to_all(
            sent,
            [batch * tokens * count * dim for count in heads],
            [batch * (q + 2 * k) * own * dim for q, k in zip(self.query_lengths, self.key_lengths, strict=True)],
        )
        del sent  # as large as all that this rank holds of q, k and v
        shapes = [
            (batch, length, own, dim)
            for q, k in zip(self.query_lengths, self.key_lengths, strict=True)
            for length in (q, k, k)
        ]
        parts = pieces(received, shapes)
        return [torch.cat(parts[kind::3], dim=1) for kind in range(3)]

    def _to_tokens(self, out: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
        """The output of all tokens and this rank's heads → of this rank's tokens and all heads."""
        batch, _, own, dim = out.shape
        local = self.query_lengths[self.group.rank]
        sent = torch.cat([part.reshape(-1) for part in out.split(list(self.query_lengths), dim=1)])
        received = self.group.all_to_all(
            sent,
            [batch * length * own * dim for length in self.query_lengths],
            [batch * local * count * dim for count in heads],
        )
        del sent
        return torch.cat(pieces(received, [(batch, local, count, dim) for count in heads]), dim=2)


def _pack_heads(tensors: Sequence[torch.Tensor], heads: Sequence[int]) -> torch.Tensor:
    """Flat message for each rank in turn: its heads of every tensor, each as `[B, S, heads, D]`.

    Ranks of equal head count are written by one strided copy a tensor, so that a tensor takes two copies at most.
    Compiled, the message is one expression of what the tensors are computed from.
    """
    runs = [_heads_of_run(tensors, *run) for run in _runs(heads)]
    if torch.compiler.is_compiling():
        return torch.cat([torch.cat([part.flatten(1) for part in parts], dim=1).flatten() for parts in runs])
    packed = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors))
    for run, parts in zip(packed.split([sum(part.numel() for part in parts) for parts in runs]), runs, strict=True):
        rows = run.view(len(parts[0]), -1)
        for part, row in zip(parts, rows.split([part[0].numel() for part in parts], dim=1), strict=True):
            row.unflatten(1, part.shape[1:]).copy_(part)
    return packed


def _runs(heads: Sequence[int]) -> list[tuple[int, int, int]]:
    """For consecutive ranks of equal head count: their first head, how many ranks they are, and heads of each."""
    found, first = [], 0
    for count, ranks in groupby(heads):
        size = len(list(ranks))
        found.append((first, size, count))
        first += size * count
    return found


def _heads_of_run(tensors: Sequence[torch.Tensor], first: int, ranks: int, count: int) -> list[torch.Tensor]:
    """Views `[ranks, B, S, heads, D]` of each tensor."""
    own = slice(first, first + ranks * count)
    return [tensor[:, :, own].unflatten(2, (ranks, count)).movedim(2, 0) for tensor in tensors]
