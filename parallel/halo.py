"""Convolutions split over ranks along the height, exact by an exchange of border rows.

Each rank holds consecutive rows of a picture or of every frame. Before a convolution it fetches the rows beyond its own
that its outputs read (the halo), and pads only at the outer edges. Heights may be uneven, and a halo may reach past a
neighbour of few rows.

Along the split dim a convolution is described by kernel, stride and padding (before, after). Output row j reads input
rows j·stride − before … j·stride − before + kernel − 1. It is computed by the rank that owns input row j·stride, so
that a stride of 2 leaves rows with the ranks they came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from parallel.collectives import Group
from parallel.segments import offsets


def output_rows(
    rows: Sequence[int], kernel: int, stride: int = 1, padding: tuple[int, int] = (0, 0)
) -> tuple[int, ...]:
    """Rows that each rank holds after a convolution. Raises `ValueError` when one would be left with none."""
    total = (sum(rows) + sum(padding) - kernel) // stride + 1
    begins = [min(-(-start // stride), total) for start in offsets(rows)] + [total]
    sizes = tuple(end - begin for begin, end in pairwise(begins))
    if min(sizes) < 1:
        raise ValueError(
            f"rows {tuple(rows)} through kernel {kernel}, stride {stride}, padding {padding} leave {sizes}: every rank "
            "must keep a row; use fewer ranks"
        )
    return sizes


def upsampled_rows(rows: Sequence[int], factor: int = 2) -> tuple[int, ...]:
    """Rows of each rank after a nearest upsampling by a whole factor, which reads no other rank's rows."""
    return tuple(size * factor for size in rows)


def fetch_rows(
    tensor: torch.Tensor,
    group: Group,
    rows: Sequence[int],
    wanted: Sequence[tuple[int, int]],
    dim: int,
    padding_mode: str = "zeros",
) -> torch.Tensor:
    """Rows `wanted[rank]` (start, stop) of the whole along `dim`, of which this rank holds its part of `rows`.

    Rows before the first and after the last are zeros, or with `padding_mode` "replicate" copies of the outermost row.
    Only rows held by others travel, each sent once to each rank that wants it. Raises `ValueError` for a tensor that
    does not follow `rows`, or a rank that wants none.
    """
    if padding_mode not in ("zeros", "replicate"):
        raise ValueError(f"padding mode {padding_mode!r}: allowed are 'zeros' and 'replicate'")
    if len(rows) != group.size or tensor.shape[dim] != rows[group.rank]:
        raise ValueError(
            f"tensor of shape {tuple(tensor.shape)} on rank {group.rank} of {group.size}: dim {dim} must follow the "
            f"rows {tuple(rows)}"
        )
    if any(min(stop, sum(rows)) <= max(start, 0) for start, stop in wanted):
        raise ValueError(f"wanted rows {list(wanted)}: every rank must want at least one of the {sum(rows)} rows")
    begins = offsets(rows)

    def overlap(owner: int, taker: int) -> tuple[int, int]:
        """Rows of `owner` that `taker` wants, counted from the owner's first row, as (start, size)."""
        start = max(wanted[taker][0], begins[owner])
        stop = min(wanted[taker][1], begins[owner] + rows[owner])
        return start - begins[owner], max(stop - start, 0)

    own = group.rank
    takers = [rank for rank in range(group.size) if rank != own and overlap(own, rank)[1]]
    owners = [rank for rank in range(group.size) if overlap(rank, own)[1]]
    pending = group.exchange(
        [(taker, tensor.narrow(dim, *overlap(own, taker))) for taker in takers],
        [(owner, _with_rows(tensor, dim, overlap(owner, own)[1])) for owner in owners if owner != own],
        tensor,
        "halo",
    )
    arrived = iter(pending.wait())
    parts = [tensor.narrow(dim, *overlap(own, own)) if owner == own else next(arrived) for owner in owners]
    start, stop = wanted[group.rank]
    before, after = max(-start, 0), max(stop - sum(rows), 0)
    return _pad(parts, dim, before, after, padding_mode)


def with_halo(
    tensor: torch.Tensor,
    group: Group,
    rows: Sequence[int],
    kernel: int,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    dim: int = -2,
    padding_mode: str = "zeros",
) -> torch.Tensor:
    """This rank's rows with all those that its outputs read: convolve it *without* padding along `dim`.

    `rows` are the input rows of every rank; those of the result of the convolution are `output_rows`.
    """
    sizes = output_rows(rows, kernel, stride, padding)
    wanted = [
        (begin * stride - padding[0], (begin + size - 1) * stride - padding[0] + kernel)
        for begin, size in zip(offsets(sizes), sizes, strict=True)
    ]
    return fetch_rows(tensor, group, rows, wanted, dim, padding_mode)


def convolve(
    convolution: nn.Conv2d | nn.Conv3d,
    tensor: torch.Tensor,
    group: Group,
    rows: Sequence[int],
    padding: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Run a convolution on this rank's rows of `[B, C, h, w]` or `[B, C, T, h, w]`, equal to the unsplit one's rows.

    `padding` (above, below) replaces the convolution's own along the height, as where a separate layer pads. Padding
    of the other dims stays the convolution's. Raises `ValueError` for a padding mode other than zeros and replicate.
    """
    own = convolution.padding[-2]
    kernel = convolution.dilation[-2] * (convolution.kernel_size[-2] - 1) + 1
    tensor = with_halo(
        tensor, group, rows, kernel, convolution.stride[-2], padding or (own, own), -2, convolution.padding_mode
    )
    others = list(convolution.padding)
    others[-2] = 0
    if convolution.padding_mode == "replicate":
        tensor = F.pad(tensor, [size for each in reversed(others) for size in (each, each)], mode="replicate")
        others = [0] * len(others)
    run = F.conv3d if isinstance(convolution, nn.Conv3d) else F.conv2d
    return run(
        tensor,
        convolution.weight,
        convolution.bias,
        convolution.stride,
        tuple(others),
        convolution.dilation,
        convolution.groups,
    )


def _pad(parts: list[torch.Tensor], dim: int, before: int, after: int, padding_mode: str) -> torch.Tensor:
    """The parts end to end, with rows added on either side, in one copy."""

    def edge(tensor: torch.Tensor, index: int, size: int) -> torch.Tensor:
        shape = _with_rows(tensor, dim, size)
        if padding_mode == "zeros":
            return tensor.new_zeros(shape)
        return tensor.narrow(dim, index, 1).expand(shape)

    first, last = parts[0], parts[-1]
    if before:
        parts = [edge(first, 0, before), *parts]
    if after:
        parts = [*parts, edge(last, last.shape[dim] - 1, after)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _with_rows(tensor: torch.Tensor, dim: int, rows: int) -> list[int]:
    shape = list(tensor.shape)
    shape[dim] = rows
    return shape
