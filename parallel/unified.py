"""Sequence-parallel attention over a grid of ranks: Ulysses inside, ring outside.

Ulysses gives each rank all tokens of its row of the grid and some heads; the ring then carries those heads' keys and
values between rows (Fang and Zhao, Unified Sequence Parallelism, arXiv 2405.07719). With one row it is Ulysses, with
one rank a row it is a ring.
"""

from __future__ import annotations

from collections.abc import Sequence

from parallel.attention import Attention, AttentionWithLse, attend, attend_with_lse
from parallel.collectives import Group
from parallel.opaque import OpaqueAttention
from parallel.ring import RingAttention
from parallel.segments import check_lengths
from parallel.ulysses import UlyssesAttention


def unified_attention(
    ulysses: Group,
    ring: Group,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    attention: Attention = attend,
    attention_with_lse: AttentionWithLse = attend_with_lse,
) -> UlyssesAttention:
    """Attention over the tokens of `ring.size · ulysses.size` ranks, called with this rank's `[B, S_local, H, D]`.

    The lengths are the token counts of every rank of the sequence group, numbered `ring · U + ulysses` as in a `Mesh`.
    Raises `ValueError` when there is not one of each a rank.
    """
    check_lengths(ring.size * ulysses.size, query_lengths, key_lengths)
    rows = [slice(row * ulysses.size, (row + 1) * ulysses.size) for row in range(ring.size)]
    between_rows = RingAttention(
        ring,
        tuple(sum(query_lengths[row]) for row in rows),
        tuple(sum(key_lengths[row]) for row in rows),
        attention,
        attention_with_lse,
    )
    if ring.size > 1:  # compiled code would lose the overlap of messages and attention if it looked inside
        between_rows = OpaqueAttention(between_rows)
    own = rows[ring.rank]
    return UlyssesAttention(ulysses, query_lengths[own], key_lengths[own], between_rows)
