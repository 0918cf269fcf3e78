"""Unit: cutting sequences of several segments over ranks. Integers and copies only: all is compared exactly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.segments import SegmentPlan, split

plans = st.builds(
    SegmentPlan,
    st.lists(st.integers(0, 40), min_size=1, max_size=4).map(tuple),
    st.integers(1, 9),
)


@given(st.integers(0, 10_000), st.integers(1, 64), st.integers(0, 64))
def test_split_is_complete_and_balanced(total, parts, first):
    sizes = split(total, parts, first)
    assert len(sizes) == parts
    assert sum(sizes) == total
    assert max(sizes) - min(sizes) <= 1


def test_split_gives_the_surplus_to_the_ranks_from_first_on():
    assert split(10, 4) == (3, 3, 2, 2)
    assert split(10, 4, first=3) == (3, 2, 2, 3)


@pytest.mark.parametrize(("total", "parts"), [(-1, 2), (3, 0)])
def test_split_refuses_the_impossible(total, parts):
    with pytest.raises(ValueError, match="at least 1 part"):
        split(total, parts)


@given(plans)
def test_every_rank_holds_an_equal_part_of_each_segment_and_of_all(plan):
    for segment in range(len(plan.lengths)):
        sizes = plan.segment_sizes(segment)
        assert max(sizes) - min(sizes) <= 1
        assert sizes == tuple(plan.sizes(rank)[segment] for rank in range(plan.ranks))
    assert max(plan.local_lengths) - min(plan.local_lengths) <= 1
    assert sum(plan.local_lengths) == plan.total  # nothing padded


def indices_of(plan: SegmentPlan, rank: int) -> list[int]:
    """The place in the whole sequence of each local token of a rank."""
    return plan.shard(torch.arange(plan.total), 0, rank).tolist()


@given(plans)
def test_indices_cover_the_sequence_once(plan):
    indices = [indices_of(plan, rank) for rank in range(plan.ranks)]
    assert sorted(index for part in indices for index in part) == list(range(plan.total))
    assert tuple(map(len, indices)) == plan.local_lengths


@given(plans)
def test_unshard_undoes_shard(plan):
    whole = torch.arange(2 * plan.total * 3).reshape(2, plan.total, 3)
    parts = [plan.shard(whole, 1, rank) for rank in range(plan.ranks)]
    for rank, part in enumerate(parts):
        assert torch.equal(part, whole[:, indices_of(plan, rank)])
    assert torch.equal(plan.unshard(parts, 1), whole)


@given(plans)
def test_one_segment_alone_is_cut_as_it_is_among_the_others(plan):
    whole = torch.arange(plan.total)
    for segment, own in enumerate(whole.split(plan.lengths)):
        only = plan.only(segment)
        parts = [plan.shard(whole, 0, rank).split(plan.sizes(rank))[segment] for rank in range(plan.ranks)]
        assert torch.equal(only.unshard(parts, 0), own)
        for rank, part in enumerate(parts):
            assert torch.equal(only.shard(own, 0, rank), part)


def test_local_order_is_segment_after_segment():
    plan = SegmentPlan((5, 4), ranks=3)
    assert plan.sizes(0) == (2, 1)
    assert indices_of(plan, 0) == [0, 1, 5]
    assert indices_of(plan, 2) == [4, 7, 8]
    assert plan.sizes(2) == (1, 2)


def test_helios_at_384_by_640_on_8_ranks():
    plan = SegmentPlan((2400, 540), ranks=8)
    assert plan.segment_sizes(0) == (300,) * 8
    assert plan.segment_sizes(1) == (68,) * 4 + (67,) * 4


@given(plans)
def test_unshard_in_the_wrong_order_is_wrong(plan):
    """The round trip can fail: with the parts of two ranks exchanged the sequence differs."""
    whole = torch.arange(plan.total)
    parts = [plan.shard(whole, 0, rank) for rank in range(plan.ranks)]
    a = plan.local_lengths.index(max(plan.local_lengths))
    same_sizes = [rank for rank in range(plan.ranks) if plan.sizes(rank) == plan.sizes(a) and rank != a]
    if not same_sizes or not parts[a].numel():
        return
    parts[a], parts[same_sizes[0]] = parts[same_sizes[0]], parts[a]
    assert not torch.equal(plan.unshard(parts, 0), whole)


def test_tensor_that_does_not_follow_the_plan_is_refused():
    plan = SegmentPlan((5, 4), ranks=3)
    with pytest.raises(ValueError, match="dim 0 must have 9 tokens"):
        plan.shard(torch.zeros(8), 0, 0)
    with pytest.raises(ValueError, match="give one part a rank"):
        plan.unshard([torch.zeros(3)], 0)
    with pytest.raises(ValueError, match="dim 0 must have 3 tokens"):
        plan.unshard([torch.zeros(4)] * 3, 0)
    with pytest.raises(ValueError, match="at least 1 rank"):
        SegmentPlan((5,), ranks=0)
