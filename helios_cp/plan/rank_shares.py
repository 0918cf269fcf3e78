"""What each rank of a sequence group holds: tokens, heads and features, cut as the engine cuts them.

This is integer arithmetic on the config; no model is built.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from helios_cp.config.checkpoint import TransformerConfig
from parallel.mesh import Degrees
from parallel.segments import SegmentPlan, split
from parallel.tensor import shard_sizes


@dataclass(frozen=True)
class Share:
    """The tokens of one rank, and those that its collectives bring to it.

    `history`, `noisy`: its own tokens. `all_noisy`: the noisy tokens of all ranks, because each holds all latents.
    `row_*`: of its Ulysses group together. `gathered_*`: of the ranks that share a feed-forward layer with it.
    `blocks`: (keys, steps) of its ring: how many keys it has in how many steps. `passed_tokens`: what it passes on
    in the ring. `heads`: its own in attention. `hidden`: its own features of a feed-forward layer.
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
    """The share of each rank of a sequence group."""
    plan = SegmentPlan(lengths, degrees.sequence)
    tokens, noisy = plan.local_lengths, plan.only(len(lengths) - 1).local_lengths
    row_tokens, row_noisy = (_sums(each, degrees.ulysses) for each in (tokens, noisy))
    gathered_tokens, gathered_noisy = (_sums(each, degrees.ffn_tp) for each in (tokens, noisy))
    heads = split(config.num_attention_heads, degrees.ulysses)
    hidden = shard_sizes(config.ffn_dim, degrees.ffn_tp)
    blocks = tuple(sorted(Counter(row_tokens).items()))
    found = []
    for rank in range(degrees.sequence):
        row, place = divmod(rank, degrees.ulysses)
        group, part = divmod(rank, degrees.ffn_tp)
        found.append(
            Share(
                history=tokens[rank] - noisy[rank],
                noisy=noisy[rank],
                all_noisy=lengths[-1],
                row_tokens=row_tokens[row],
                row_noisy=row_noisy[row],
                blocks=blocks,
                passed_tokens=sum(row_tokens) - row_tokens[(row + 1) % degrees.ring],  # the last goes no further
                gathered_tokens=gathered_tokens[group],
                gathered_noisy=gathered_noisy[group],
                heads=heads[place],
                hidden=hidden[part],
            )
        )
    return tuple(found)


def whole(config: TransformerConfig, lengths: tuple[int, ...]) -> Share:
    """The share of a rank that is alone."""
    return shares(config, lengths, Degrees())[0]


def _sums(values: Sequence[int], size: int) -> list[int]:
    """Of each `size` values in a row."""
    return [sum(values[first : first + size]) for first in range(0, len(values), size)]
