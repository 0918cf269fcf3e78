"""Unit and multi-rank gloo: convolutions split over the height, with borders fetched in place, against unsplit ones.

Both compute the same products in fp64, but kernels may add them in another order for another height: a few hundred
products leave rounding errors below 1e-13. What travels is exact.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn

from parallel.collectives import Group, Meter
from parallel.halo import fetch_borders
from parallel.segments import split
from tests.parallel.reference import world_group

TOLERANCE = 1e-13
CHANNELS, WIDTH = 3, 5

# rows above and below that a kernel reads, and its height
KERNELS = {"3": (1, 1), "5": (2, 2), "4, asymmetric": (1, 2), "2, below only": (0, 1), "2, above only": (1, 0)}


def picture(rows: int) -> torch.Tensor:
    return torch.randn(2, CHANNELS, rows, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def padded(tensor: torch.Tensor, above: int, below: int, value: float = 0.0) -> torch.Tensor:
    """With room above and below; what is in it before it is filled must not matter."""
    return nn.functional.pad(tensor, (0, 0, above, below), value=value)


def convolution(above: int, below: int) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(CHANNELS, CHANNELS, (above + 1 + below, 3), padding=(0, 1)).double()


def heights(size: int) -> list[tuple[int, ...]]:
    return [(2,) * size, tuple(2 + (3 * rank) % 4 for rank in range(size)), split(3 * size + 1, size)]


@torch.no_grad()
def run_convolutions(rank: int, size: int) -> float:
    """The largest error of any kernel at any heights."""
    errors = []
    for rows in heights(size):
        whole, group = picture(sum(rows)), world_group()
        for above, below in KERNELS.values():
            layer = convolution(above, below)
            own = padded(whole.split(rows, 2)[rank], above, below, float("nan"))
            fetch_borders(own, group, 2, above, below)
            expected = layer(padded(whole, above, below)).split(rows, 2)[rank]
            errors.append((layer(own) - expected).abs().max().item())
    return max(errors)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_equals_the_unsplit_convolution(ranks, size):
    assert max(ranks.run(run_convolutions, size, ranks=size)) <= TOLERANCE


@torch.no_grad()
def run_along_another_dim(rank: int, rows: tuple[int, ...]) -> bool:
    whole = picture(sum(rows)).movedim(2, 0)
    own = nn.functional.pad(whole.split(rows)[rank], (0, 0, 0, 0, 0, 0, 1, 1))
    fetch_borders(own, world_group(), 0, 1, 1)
    start = sum(rows[:rank])
    edges = nn.functional.pad(whole, (0, 0, 0, 0, 0, 0, 1, 1))
    return torch.equal(own, edges[start : start + rows[rank] + 2])


def test_any_dim_can_be_split(ranks):
    assert ranks.run(run_along_another_dim, (2, 1, 4), ranks=3) == [True] * 3


@torch.no_grad()
def run_metered(rank: int, above: int, below: int) -> tuple[int, int]:
    group = world_group(Meter())
    fetch_borders(picture(4 + above + below).float(), group, 2, above, below)
    return group.meter.total_calls, group.meter.total_bytes


@pytest.mark.parametrize(("above", "below"), [(1, 1), (0, 1), (2, 1)])
def test_each_border_travels_once(ranks, above, below):
    row = 2 * CHANNELS * WIDTH * 4
    ends, middle = (1, above * row), (1, (above + below) * row)
    first, *inner, last = ranks.run(run_metered, above, below, ranks=4)
    assert inner == [middle] * 2 and first == ends and last == (1, below * row)


def test_one_rank_has_zeros_around_and_sends_nothing():
    group, tensor = Group(None, meter=Meter()), padded(picture(3), 1, 2, 7.0)
    fetch_borders(tensor, group, 2, 1, 2)
    assert torch.equal(tensor, padded(picture(3), 1, 2)) and group.meter.total_calls == 0


def test_too_few_rows_are_refused():
    two = Group(mock.sentinel.process_group, ranks=(0, 1))
    with pytest.raises(ValueError, match="1 rows on rank 0: its neighbours need 2 of them"):
        fetch_borders(picture(4), two, 2, 1, 2)


@torch.no_grad()
def run_wrong_way(rank: int) -> float:
    """As if the rows of the rank before went below, and those of the rank after above."""
    layer, rows, whole = convolution(1, 1), (2, 2, 2), picture(6)
    own = padded(whole.split(rows, 2)[rank], 1, 1)
    fetch_borders(own, world_group(), 2, 1, 1)
    own[:, :, [0, -1]] = own[:, :, [-1, 0]]
    return (layer(own) - layer(padded(whole, 1, 1)).split(rows, 2)[rank]).abs().max().item()


def test_borders_that_are_exchanged_are_seen(ranks):
    assert min(ranks.run(run_wrong_way, ranks=3)) > 0.1
