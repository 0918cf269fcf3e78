"""What each rank of a sequence group holds: its tokens, heads and features, by the plans that the engine cuts with.

Integer arithmetic on the config alone; no model is built.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

from helios_cp.config.checkpoint import TransformerConfig
from parallel.mesh import Degrees
from parallel.segments import SegmentPlan, split
from parallel.tensor import shard_sizes


@dataclass(frozen=True)
class Share:
    """What one rank of the sequence group holds: its tokens, and those it meets in its collectives.

    `all_noisy` are the noisy tokens of all ranks, whose latents each has before and after. `row_*` are of its Ulysses
    group together, `gathered_*` of the ranks that share a feed-forward layer. `blocks` are the keys that it has at the
    steps of the ring, as (tokens, steps), and `passed_tokens` those that it passes on. `heads` are its own in
    attention, `hidden` its own features of a feed-forward layer.
    """

    history: int
    noisy: int
    all_noisy: int
    row_tokens: int
    row_noisy: int
    blocks: tuple[tuple[int, int], ...]
    passed_tokens: int
    gathered_tokens: int
    gathered_noisy: int
    heads: int
    hidden: int

    @property
    def tokens(self) -> int:
        return self.history + self.noisy


@functools.lru_cache(maxsize=1024)
def shares(config: TransformerConfig, lengths: tuple[int, ...], degrees: Degrees) -> tuple[Share, ...]:
    """What each rank of a sequence group holds, by the plans with which the engine cuts sequence, heads and layers."""
    every, last = _local_lengths(lengths, degrees.sequence)
    rows = range(0, degrees.sequence, degrees.ulysses)
    row_tokens = [sum(every[first : first + degrees.ulysses]) for first in rows]
    row_noisy = [sum(last[first : first + degrees.ulysses]) for first in rows]
    blocks = tuple(sorted(Counter(row_tokens).items()))
    heads = split(config.num_attention_heads, degrees.ulysses)
    hidden = shard_sizes(config.ffn_dim, degrees.ffn_tp)
    groups = range(0, degrees.sequence, degrees.ffn_tp)
    gathered = [sum(every[first : first + degrees.ffn_tp]) for first in groups]
    gathered_noisy = [sum(last[first : first + degrees.ffn_tp]) for first in groups]
    found = []
    for rank in range(degrees.sequence):
        row, own = divmod(rank, degrees.ulysses)
        group, part = divmod(rank, degrees.ffn_tp)
        found.append(
            Share(
                history=every[rank] - last[rank],
                noisy=last[rank],
                all_noisy=lengths[-1],
                row_tokens=row_tokens[row],
                row_noisy=row_noisy[row],
                blocks=blocks,
                passed_tokens=sum(row_tokens) - row_tokens[(row + 1) % degrees.ring],  # the last goes no further
                gathered_tokens=gathered[group],
                gathered_noisy=gathered_noisy[group],
                heads=heads[own],
                hidden=hidden[part],
            )
        )
    return tuple(found)


def whole(config: TransformerConfig, lengths: tuple[int, ...]) -> Share:
    """The share of a rank that is alone."""
    return shares(config, lengths, Degrees())[0]


@functools.lru_cache(maxsize=1024)
def _local_lengths(lengths: tuple[int, ...], ranks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """All tokens, and the noisy ones, of each rank."""
    plan = SegmentPlan(lengths, ranks)
    return plan.local_lengths, plan.only(len(lengths) - 1).local_lengths
