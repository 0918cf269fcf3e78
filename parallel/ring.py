"""Sequence-parallel attention by a ring: keys and values travel round while each rank keeps its queries.

At every step a rank attends to the block that it holds while that block is on its way to the next rank; the partial
outputs are merged by their log-sum-exp (Liu et al., Ring Attention, arXiv 2310.01889). Any number of heads will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from parallel.attention import Attention, AttentionWithLse, attend, attend_with_lse, merge
from parallel.collectives import Group
from parallel.segments import check_lengths, check_local


@dataclass(eq=False)
class RingAttention:
    """Attention over the tokens of a whole group, called with this rank's `[B, S_local, H, D]` and returning the same.

    `query_lengths` and `key_lengths` are the token counts of every rank. K and V travel in one message; a call makes
    one exchange fewer than there are ranks. Blocks are merged in fp32 in a fixed order (this rank's own block first,
    then those of the ranks before it, going back), so that a run gives the same bits every time. `attention` serves a
    group of one, where nothing is merged. Raises `ValueError` for tokens that do not follow the plan.
    """

    group: Group
    query_lengths: Sequence[int]
    key_lengths: Sequence[int]
    attention: Attention = attend
    attention_with_lse: AttentionWithLse = attend_with_lse

    def __post_init__(self) -> None:
        check_lengths(self.group.size, self.query_lengths, self.key_lengths)

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        check_local(self.group.rank, self.query_lengths, self.key_lengths, query, key)
        if self.group.size == 1:
            return self.attention(query, key, value)
        block = torch.stack((key, value))
        out = lse = None
        for step in range(self.group.size):
            last = step == self.group.size - 1
            if not last:  # what arrives during this step started step + 1 ranks before
                owner = (self.group.rank - step - 1) % self.group.size
                pending = self.group.ring_exchange(block, (*block.shape[:2], self.key_lengths[owner], *block.shape[3:]))
            partial, partial_lse = self.attention_with_lse(query, *block)
            out, lse = (partial, partial_lse) if step == 0 else merge(out, lse, partial, partial_lse)
            if not last:
                (block,) = pending.wait()
        return out.to(query.dtype)
