"""A feed-forward layer whose weights are split over ranks that hold different tokens.

The first linear is split by columns (output features), the second by rows (input features), as in Megatron-LM (Shoeybi
et al., arXiv 1909.08053). As the ranks share one sequence, tokens are all-gathered in and the partial sums
reduce-scattered out. It moves more bytes than whole weights would: use it for memory, not for speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from parallel.collectives import Group
from parallel.segments import split


def shard_sizes(hidden: int, ranks: int) -> tuple[int, ...]:
    """Hidden features of each rank, uneven where they do not divide.

    Raises `ValueError` when a rank would have none.
    """
    if ranks > hidden:
        raise ValueError(f"{hidden} hidden features over {ranks} ranks: at most {hidden} ranks are allowed")
    return split(hidden, ranks)


def shard_slice(hidden: int, ranks: int, rank: int) -> slice:
    """The hidden features of one rank: rows of the first weight and of its bias, columns of the second weight."""
    sizes = shard_sizes(hidden, ranks)
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


def feed_forward(
    hidden: torch.Tensor,
    first: Callable[[torch.Tensor], torch.Tensor],
    activation: Callable[[torch.Tensor], torch.Tensor],
    second: nn.Linear,
    group: Group,
    lengths: Sequence[int],
) -> torch.Tensor:
    """`second(activation(first(x)))` of this rank's tokens `[B, S_local, D]`, with the weights split over the group.

    `first` holds this rank's rows of weight and bias; `second` its columns of the weight and the *whole* bias, which is
    added once, to the sum. The activation must act on each feature alone (a gated one needs its halves sliced alike).
    `lengths` are the token counts of every rank of the group.
    """
    if group.size == 1:
        return second(activation(first(hidden)))
    gathered = torch.cat(group.all_gather(hidden, lengths, dim=1), dim=1)
    partial = F.linear(activation(first(gathered)), second.weight)
    total = group.reduce_scatter(partial, lengths, dim=1)
    if second.bias is not None:
        total = total + second.bias
    return total.to(hidden.dtype)
