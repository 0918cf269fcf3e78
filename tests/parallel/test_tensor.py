"""Multi-rank gloo: the feed-forward layer with split weights against the whole one.

In fp64 the sums of a few dozen products leave rounding errors of about 1e-15; in fp32 about 1e-6. In bfloat16 every
rank's partial sum is rounded to 8 bits before it is added.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from parallel.collectives import Meter
from parallel.segments import SegmentPlan
from parallel.tensor import feed_forward, shard_sizes, shard_slice
from tests.parallel.reference import world_group

WIDTH, HIDDEN, BATCH = 12, 29, 2
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 3e-2}


def _whole(dtype, bias):
    torch.manual_seed(0)
    first, second = nn.Linear(WIDTH, HIDDEN, bias=bias), nn.Linear(HIDDEN, WIDTH, bias=bias)
    return first.to(dtype), second.to(dtype)


def _sliced(first, second, part):
    """A rank's slices: rows of the first weight and bias, columns of the second weight, the whole second bias."""
    rows, columns = (nn.Linear(1, 1, bias=linear.bias is not None) for linear in (first, second))
    rows.weight, columns.weight = nn.Parameter(first.weight[part]), nn.Parameter(second.weight[:, part])
    if first.bias is not None:
        rows.bias, columns.bias = nn.Parameter(first.bias[part]), second.bias
    return rows, columns


def _error(rank, dtype, bias, dropped=None, meter=None):
    group = world_group(meter)
    lengths = SegmentPlan((11, 9), group.size).local_lengths
    first, second = _whole(dtype, bias)
    hidden = torch.randn(BATCH, sum(lengths), WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = second.double()(nn.functional.gelu(first.double()(hidden.double())))
    first, second = _sliced(first.to(dtype), second.to(dtype), shard_slice(HIDDEN, group.size, rank))
    if rank == dropped:
        nn.init.zeros_(second.weight)
    own = hidden.split(lengths, dim=1)[rank]
    out = feed_forward(own, first, nn.functional.gelu, second, group, lengths)
    assert out.dtype == dtype
    return (out.double() - expected.split(lengths, dim=1)[rank]).abs().max().item()


@torch.no_grad()
def _errors(rank):
    return {(dtype, bias): _error(rank, dtype, bias) for dtype in TOLERANCE for bias in (True, False)}


@pytest.mark.parametrize("size", range(1, 9))
def test_equals_the_whole_layer(ranks, size):
    for errors in ranks.run(_errors, ranks=size):
        assert all(error < TOLERANCE[dtype] for (dtype, _), error in errors.items()), errors


@torch.no_grad()
def _error_without_rank_1(rank):
    return _error(rank, torch.float64, True, dropped=1)


def test_dropped_shard_is_seen(ranks):
    assert min(ranks.run(_error_without_rank_1, ranks=3)) > 1e-2


@torch.no_grad()
def _metered(rank, tokens, width):
    meter = Meter()
    group = world_group(meter)
    lengths = SegmentPlan((tokens,), group.size).local_lengths
    first, second = nn.Linear(width, 1), nn.Linear(1, width)
    hidden = torch.zeros(1, lengths[rank], width, dtype=torch.bfloat16)
    feed_forward(hidden, first.bfloat16(), nn.functional.gelu, second.bfloat16(), group, lengths)
    return meter


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_bytes_follow_the_cost_model(ranks, size):
    """2SD · (P − 1)/P elements a layer and rank, in bf16."""
    for meter in ranks.run(_metered, 11040, 80, ranks=size):
        assert meter.total_bytes == 2 * 2 * 11040 * 80 * (size - 1) // size
        assert meter.calls == ({"all_gather": 1, "reduce_scatter": 1} if size > 1 else {})


@given(st.integers(1, 400), st.integers(1, 8))
def test_shards_cover_the_hidden_features_once(hidden, count):
    if hidden < count:
        with pytest.raises(ValueError, match="ranks are allowed"):
            shard_sizes(hidden, count)
        return
    sizes = shard_sizes(hidden, count)
    slices = [shard_slice(hidden, count, rank) for rank in range(count)]
    assert [index for part in slices for index in range(hidden)[part]] == list(range(hidden))
    assert max(sizes) - min(sizes) <= 1


def test_shards_of_helios_14b():
    assert shard_sizes(13824, 8) == (1728,) * 8
    assert shard_sizes(13824, 7) == (1975,) * 6 + (1974,)
