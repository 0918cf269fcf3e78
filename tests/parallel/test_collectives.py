"""Multi-rank gloo (and GPU): collectives of uneven parts, and the meter.

What is only moved is compared exactly; sums are of small integers, which every order of addition gives exactly, but for
the test of the order itself.
"""

import pytest
import torch

from parallel.collectives import Group, Meter, pieces
from parallel.segments import split
from tests.parallel.reference import world_group

SIZES = range(1, 9)
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64)


def _values(source, target, size, dtype, device="cpu"):
    """What rank `source` sends to rank `target`: a length and values that name both."""
    return torch.full((size,), 10 * source + target, dtype=dtype, device=device)


def _check_all_to_all(rank, dtype, stage, device="cpu"):
    group = world_group(stage=stage)
    length = [[(source + 2 * target) % 4 for target in range(group.size)] for source in range(group.size)]
    sent = torch.cat([_values(rank, to, length[rank][to], dtype, device) for to in range(group.size)])
    received = group.all_to_all(sent, length[rank], [length[source][rank] for source in range(group.size)])
    expected = [_values(source, rank, length[source][rank], dtype, device) for source in range(group.size)]
    assert received.device == sent.device
    assert torch.equal(received, torch.cat(expected))


def _check_all_gather(rank, dtype, stage, device="cpu"):
    group = world_group(stage=stage)
    lengths = [(3 * source + 1) % 5 for source in range(group.size)]  # the fourth rank has nothing
    parts = [torch.full((2, length, 3), source, dtype=dtype, device=device) for source, length in enumerate(lengths)]
    transposed = parts[rank].transpose(0, 2).contiguous().transpose(0, 2)
    for mine in (parts[rank], transposed):
        gathered = group.all_gather(mine, lengths, dim=1)
        assert all(torch.equal(a, b) for a, b in zip(gathered, parts, strict=True))


def _check_reduce_scatter(rank, dtype, stage, device="cpu"):
    group = world_group(stage=stage)
    lengths = split(7, group.size)
    for shape in ((1, 7, 2), (3, 7, 2)):
        whole = torch.arange(7 * shape[0] * 2, device=device).reshape(shape) % 5
        total = group.reduce_scatter((whole * (rank + 1)).to(dtype), lengths, dim=1)
        factor = group.size * (group.size + 1) // 2
        assert total.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(total, (whole * factor).split(lengths, dim=1)[rank].to(total.dtype))


def _check_broadcast(rank, dtype, stage, device="cpu"):
    group = world_group(stage=stage)
    source = group.size - 1
    tensor = torch.full((3, 2), rank, dtype=dtype, device=device).t()
    assert group.broadcast(tensor, source) is tensor
    assert torch.equal(tensor, torch.full_like(tensor, source))
    assert group.broadcast_object({"rank": rank}, source) == {"rank": source}


def _check_ring(rank, dtype, stage, device="cpu"):
    group = world_group(stage=stage)
    before = (rank - 1) % group.size
    pending = group.ring_exchange(torch.full((rank, 2), rank, dtype=dtype, device=device), (before, 2))
    (received,) = pending.wait()
    assert torch.equal(received, torch.full((before, 2), before, dtype=dtype, device=device))


CHECKS = (_check_all_to_all, _check_all_gather, _check_reduce_scatter, _check_broadcast, _check_ring)


def _all_checks(rank, checks, device="cpu"):
    for check in checks:
        for dtype in DTYPES:
            for stage in (False, True):
                if check is not _check_reduce_scatter or dtype.is_floating_point:
                    check(rank, dtype, stage, device)


@pytest.mark.parametrize("size", SIZES)
def test_uneven_collectives(ranks, size):
    ranks.run(_all_checks, CHECKS, ranks=size)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [2, 3])
def test_uneven_collectives_of_cuda_tensors_over_gloo(ranks, size):
    ranks.run(_all_checks, CHECKS, "cuda:0", ranks=size, timeout=120)


def _drop_part(rank):
    """The all-gather check with rank 1's part replaced by zeros on its way."""
    group = world_group()
    part = torch.full((2,), rank + 1)
    sent = torch.zeros_like(part) if rank == 1 else part
    gathered = group.all_gather(sent, [2] * group.size, 0)
    return torch.equal(torch.cat(gathered), torch.arange(1, group.size + 1).repeat_interleave(2))


def test_dropped_part_is_seen(ranks):
    assert ranks.run(_drop_part, ranks=3) == [False] * 3


def _sums_in_rank_order(rank):
    """Numbers whose sum in fp32 depends on the order of addition: 2^24 + 1 + 1 in rank order loses both ones."""
    group = world_group()
    tensor = torch.full((3,), 2.0**24 if rank == 0 else 1.0)
    return group.reduce_scatter(tensor, [1, 1, 1], 0).item()


def test_reduce_scatter_adds_in_rank_order(ranks):
    assert ranks.run(_sums_in_rank_order, ranks=3) == [2.0**24] * 3


def _sums_of_bfloat16(rank):
    return (
        world_group()
        .reduce_scatter(torch.full((2,), 256.0 if rank == 0 else 1.0, dtype=torch.bfloat16), [1, 1], 0)
        .item()
    )


def test_reduce_scatter_adds_bfloat16_in_fp32(ranks):
    assert ranks.run(_sums_of_bfloat16, ranks=2) == [257.0] * 2  # bfloat16 has no 257


def _metered(rank):
    meter = Meter()
    group = world_group(meter)
    size = group.size
    group.all_to_all(torch.zeros(3 * size), [3] * size, [3] * size)
    group.all_gather(torch.zeros(2, rank + 1, dtype=torch.bfloat16), range(1, size + 1), 1)
    group.reduce_scatter(torch.zeros(4, size), [1] * size, 1)
    group.broadcast(torch.zeros(5), source=0)
    group.ring_exchange(torch.zeros(7), (7,)).wait()
    return meter


@pytest.mark.parametrize("size", [1, 2, 5])
def test_meter_counts_what_each_rank_sends_to_others(ranks, size):
    for rank, meter in enumerate(ranks.run(_metered, ranks=size)):
        others = size - 1
        if not others:
            assert meter.total_calls == meter.total_bytes == 0
            continue
        assert meter.calls == dict.fromkeys(("all_to_all", "all_gather", "reduce_scatter", "broadcast", "ring"), 1)
        assert meter.sent_bytes == {
            "all_to_all": 3 * 4 * others,
            "all_gather": 2 * (rank + 1) * 2 * others,
            "reduce_scatter": 4 * 4 * others,
            "broadcast": 5 * 4 * others if rank == 0 else 0,
            "ring": 7 * 4,
        }
        assert meter.total_calls == 5
        meter.reset()
        assert meter.total_bytes == 0


def test_sizes_that_do_not_fit_are_refused():
    group = Group(None)
    with pytest.raises(ValueError, match="must be flat, with one piece a rank"):
        group.all_to_all(torch.zeros(4), [3], [3])
    with pytest.raises(ValueError, match="dim 0 must follow the lengths"):
        group.all_gather(torch.zeros(4), [3], 0)
    with pytest.raises(ValueError, match="dim 0 must be the sum of the lengths"):
        group.reduce_scatter(torch.zeros(4), [3], 0)
    with pytest.raises(ValueError, match="more than one rank needs a process group"):
        Group(None, (0, 1))


def test_pieces_are_views_in_order():
    flat = torch.arange(10)
    first, second = pieces(flat, [(2, 3), (4,)])
    assert first.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert second.tolist() == [6, 7, 8, 9]
    assert first.data_ptr() == flat.data_ptr()
