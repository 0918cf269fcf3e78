"""Border rows for convolutions that are split over ranks along the height.

Each rank holds consecutive rows of a picture or of every frame. Its buffer has room above and below for the rows of its
neighbours that its outputs read (the halo). Heights may be uneven. With these rows in place a rank convolves without
padding along the height, and gets what the unsplit convolution computes for its rows.
"""

from __future__ import annotations

import torch

from parallel.collectives import Group


def fetch_borders(buffer: torch.Tensor, group: Group, dim: int, above: int, below: int) -> None:
    """Fill the first `above` and the last `below` rows of `buffer` along `dim` in place. This rank's rows lie between.

    They become the last rows of the rank before and the first of the rank after, or zeros outside of the picture. Every
    rank of the group calls it with the same `above` and `below`. Raises `ValueError` for a rank of too few rows.
    """
    size = buffer.shape[dim] - above - below
    if size < max(above, below):
        raise ValueError(f"{size} rows on rank {group.rank}: its neighbours need {max(above, below)} of them")
    own = buffer.narrow(dim, above, size)
    first, last = buffer.narrow(dim, 0, above), buffer.narrow(dim, above + size, below)
    before, after = group.rank - 1, group.rank + 1
    messages = []  # (rank, rows to send, where rows from there go)
    if before >= 0:
        messages.append((before, own.narrow(dim, 0, below), first))
    else:
        first.zero_()
    if after < group.size:
        messages.append((after, own.narrow(dim, size - above, above), last))
    else:
        last.zero_()
    sends = [(rank, rows) for rank, rows, _ in messages if rows.numel()]
    places = [(rank, place) for rank, _, place in messages if place.numel()]
    pending = group.exchange(sends, [(rank, place.shape) for rank, place in places], buffer, "halo")
    for (_, place), rows in zip(places, pending.wait(), strict=True):
        place.copy_(rows)
