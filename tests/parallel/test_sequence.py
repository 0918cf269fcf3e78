"""Multi-rank gloo (and GPU): Ulysses, ring and unified attention against unsharded attention.

The reference is softmax attention written out in fp64. In fp64 the algorithms leave rounding errors of about 1e-15, so
1e-13 sees any wrong token; fp32 leaves about 1e-6 and bfloat16 rounds each output to 8 bits.
"""

from unittest import mock

import pytest
import torch

import parallel.ring
from parallel.attention import merge
from parallel.collectives import Group, Meter
from parallel.mesh import Degrees, Mesh
from parallel.ring import RingAttention
from parallel.segments import SegmentPlan, split
from parallel.ulysses import UlyssesAttention
from parallel.unified import unified_attention
from tests.parallel.reference import random_qkv, reference_attention, world_group

TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 2e-2}
GRIDS = [Degrees(ring=r, ulysses=u) for r, u in ((2, 2), (2, 3), (3, 2), (2, 4), (4, 2))]
LAYOUTS = [Degrees(ulysses=p) for p in range(1, 9)] + [Degrees(ring=p) for p in range(2, 9)] + GRIDS


def _attention(mesh, query_lengths, key_lengths, **options):
    """The algorithm that a layout stands for, by its own class where it is Ulysses or ring alone."""
    if mesh.ring.size == 1:
        return UlyssesAttention(mesh.ulysses, query_lengths, key_lengths, **options)
    if mesh.ulysses.size == 1:
        return RingAttention(mesh.ring, query_lengths, key_lengths, **options)
    return unified_attention(mesh.ulysses, mesh.ring, query_lengths, key_lengths, **options)


def _cases(ranks, ulysses):
    """(query lengths, key lengths, heads, batch) per rank count: what may be uneven is."""
    plan = SegmentPlan((11, 9), ranks)
    everything, noisy, one = plan.local_lengths, plan.only(1).local_lengths, (1,) * ranks
    few = split(ranks // 2 + 1, ranks, first=1)  # some ranks have nothing at all
    yield everything, everything, max(5, ulysses), 1
    yield everything, everything, 2 * ulysses + 1, 2
    yield noisy, everything, ulysses, 2
    yield one, one, ulysses, 1
    yield one, everything, 40, 2
    yield few, everything, ulysses, 1
    yield everything, few, ulysses, 2


def _shards(rank, tensor, lengths):
    return tensor.split(list(lengths), dim=1)[rank]


def _error(rank, mesh, case, dtype, device="cpu"):
    query_lengths, key_lengths, heads, batch = case
    query, key, value = random_qkv(batch, sum(query_lengths), sum(key_lengths), heads, 8, dtype, device)
    attention = _attention(mesh, query_lengths, key_lengths)
    own = (_shards(rank, t, n) for t, n in ((query, query_lengths), (key, key_lengths), (value, key_lengths)))
    out = attention(*own)
    expected = _shards(rank, reference_attention(query, key, value)[0], query_lengths)
    assert out.shape == expected.shape
    assert out.dtype == dtype
    return (out.double() - expected).abs().max().item() if out.numel() else 0.0


def _errors(rank, degrees, dtypes, device="cpu"):
    mesh = Mesh.build(degrees)
    return {
        (case, dtype): _error(rank, mesh, case, dtype, device)
        for case in _cases(degrees.world, degrees.ulysses)
        for dtype in dtypes
    }


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_equals_unsharded_attention(ranks, degrees):
    for errors in ranks.run(_errors, degrees, tuple(TOLERANCE), ranks=degrees.world):
        assert all(error < TOLERANCE[dtype] for (_, dtype), error in errors.items()), errors


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("degrees", [Degrees(ulysses=3), Degrees(ring=3), Degrees(ring=2, ulysses=2)], ids=str)
def test_equals_unsharded_attention_on_one_shared_card(ranks, degrees):
    dtypes = (torch.float32, torch.bfloat16)
    for errors in ranks.run(_errors, degrees, dtypes, "cuda:0", ranks=degrees.world, timeout=120):
        assert all(error < TOLERANCE[dtype] for (_, dtype), error in errors.items()), errors


def _helios_heads(rank, degrees):
    mesh = Mesh.build(degrees)
    lengths = SegmentPlan((24, 17), degrees.world).local_lengths
    return _error(rank, mesh, (lengths, lengths, 40, 2), torch.float64)


@pytest.mark.parametrize("size", [3, 6, 7])
def test_forty_heads_on_ranks_that_do_not_divide_them(ranks, size):
    assert max(ranks.run(_helios_heads, Degrees(ulysses=size), ranks=size)) < 1e-13


def _same_bits_twice(rank, degrees):
    mesh = Mesh.build(degrees)
    lengths = SegmentPlan((11, 9), degrees.world).local_lengths
    own = [_shards(rank, tensor, lengths) for tensor in random_qkv(2, 20, 20, 5, 8, torch.float32)]
    attention = _attention(mesh, lengths, lengths)
    return torch.equal(attention(*own), attention(*own))


@pytest.mark.parametrize("degrees", [Degrees(ring=5), Degrees(ulysses=5), Degrees(ring=2, ulysses=3)], ids=str)
def test_same_bits_on_every_run(ranks, degrees):
    assert all(ranks.run(_same_bits_twice, degrees, ranks=degrees.world))


# Broken on purpose: each must be seen by far.


def _broken_error(rank, degrees, broken):
    plan = SegmentPlan((11, 9), degrees.world)
    case = plan.local_lengths, plan.local_lengths, 6, 2
    with broken():
        return _error(rank, Mesh.build(degrees), case, torch.float64)


def _lose_pieces_of_rank_1():
    """An all-to-all that delivers zeros in place of what rank 1 sent."""
    whole = Group.all_to_all

    def lossy(self, tensor, send_sizes, receive_sizes, kind="all_to_all"):
        received = whole(self, tensor, send_sizes, receive_sizes, kind)
        received[receive_sizes[0] : receive_sizes[0] + receive_sizes[1]] = 0
        return received

    return mock.patch.object(Group, "all_to_all", lossy)


def _merge_without_rescale():
    def average(out_a, lse_a, out_b, lse_b):
        return (out_a + out_b) / 2, merge(out_a, lse_a, out_b, lse_b)[1]

    return mock.patch.object(parallel.ring, "merge", average)


def _skip_one_block():
    """A ring that forgets the last block to arrive."""
    calls = []

    def forgetful(out_a, lse_a, out_b, lse_b):
        calls.append(None)
        return (out_a, lse_a) if len(calls) == 1 else merge(out_a, lse_a, out_b, lse_b)

    return mock.patch.object(parallel.ring, "merge", forgetful)


@pytest.mark.parametrize(
    ("degrees", "broken"),
    [
        (Degrees(ulysses=3), _lose_pieces_of_rank_1),
        (Degrees(ring=3), _merge_without_rescale),
        (Degrees(ring=3), _skip_one_block),
        (Degrees(ring=2, ulysses=2), _lose_pieces_of_rank_1),
        (Degrees(ring=2, ulysses=2), _merge_without_rescale),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_broken_algorithm_is_seen(ranks, degrees, broken):
    assert min(ranks.run(_broken_error, degrees, broken, ranks=degrees.world)) > 1e-2


# Bytes and calls.


def _metered(rank, degrees, plan, heads, dim, channels):
    """What one layer's attention sends, and what the gather of the last segment's outputs does."""
    layer, gather = Meter(), Meter()
    own = torch.zeros(1, plan.local_lengths[rank], heads, dim, dtype=torch.bfloat16)
    # What is sent does not depend on the attention itself, which would take its time.
    options = {"attention": lambda query, key, value: query}
    if degrees.ring > 1:
        options["attention_with_lse"] = lambda query, key, value: (query, query.new_zeros(1))
    mesh = Mesh.build(degrees, meter=layer)
    with mock.patch.object(parallel.ring, "merge", lambda out, lse, *_: (out, lse)):
        _attention(mesh, plan.local_lengths, plan.local_lengths, **options)(own, own, own)
    noisy = plan.only(len(plan.lengths) - 1).local_lengths
    world_group(gather).all_gather(torch.zeros(1, noisy[rank], channels, dtype=torch.bfloat16), noisy, 1)
    return layer, gather


@pytest.mark.parametrize(
    ("degrees", "megabytes", "calls"),
    [
        (Degrees(), 0, {}),
        (Degrees(ulysses=2), 4523, {"all_to_all": 2}),
        (Degrees(ulysses=4), 3392, {"all_to_all": 2}),
        (Degrees(ulysses=8), 1979, {"all_to_all": 2}),
        (Degrees(ring=2), 4523, {"ring": 1}),
        (Degrees(ring=4), 6784, {"ring": 3}),
        (Degrees(ring=8), 7914, {"ring": 7}),
        (Degrees(ring=2, ulysses=2), 4523, {"all_to_all": 2, "ring": 1}),
        (Degrees(ring=2, ulysses=4), 2827, {"all_to_all": 2, "ring": 1}),
    ],
    ids=str,
)
def test_bytes_of_a_stage_3_forward_of_helios_14b_follow_the_cost_model(ranks, degrees, megabytes, calls):
    """40 layers, S = 2400 + 8640, D = 5120 in bf16, counted on heads of dim 2 in place of 128.

    Elements per rank and layer: Ulysses 4SD/P · (U − 1)/U, ring 2SD/P · (R − 1); then one gather of the noisy outputs,
    64 channels a token.
    """
    plan = SegmentPlan((2400, 8640), degrees.world)
    elements = 11040 * 5120 // degrees.world
    expected = 4 * elements * (degrees.ulysses - 1) // degrees.ulysses + 2 * elements * (degrees.ring - 1)
    for layer, gather in ranks.run(_metered, degrees, plan, 40, 2, 64, ranks=degrees.world):
        assert layer.total_bytes * 64 == 2 * expected
        assert layer.calls == calls
        assert round((40 * 64 * layer.total_bytes + gather.total_bytes) / 1e6) == megabytes
        if degrees.ulysses == degrees.world > 1:
            assert 40 * layer.total_calls + gather.total_calls == 81


@pytest.mark.parametrize("size", [3, 5, 7])
def test_bytes_of_uneven_parts_are_those_of_real_tokens_alone(ranks, size):
    plan, heads = SegmentPlan((11, 9), size), split(40, size)
    lengths = plan.local_lengths
    meters = ranks.run(_metered, Degrees(ulysses=size), plan, 40, 2, 1, ranks=size)
    for (layer, _), length, own in zip(meters, lengths, heads, strict=True):
        assert layer.sent_bytes["all_to_all"] == 2 * 2 * (3 * length * (40 - own) + (20 - length) * own)
    for rank, (layer, _) in enumerate(ranks.run(_metered, Degrees(ring=size), plan, 40, 2, 1, ranks=size)):
        assert layer.sent_bytes["ring"] == 2 * 2 * 40 * 2 * (20 - lengths[(rank + 1) % size])


# Refusals.


def test_plans_and_tensors_that_do_not_fit_are_refused():
    group = Group(None)
    query, key, value = random_qkv(1, 3, 4, 2, 8)
    for algorithm in (UlyssesAttention, RingAttention):
        with pytest.raises(ValueError, match="2 query and 1 key lengths are given; give one of each a rank"):
            algorithm(group, (1, 2), (4,))
        with pytest.raises(ValueError, match="rank 0 has 3 query and 4 key tokens, but the plan says 3 and 5"):
            algorithm(group, (3,), (5,))(query, key, value)
    with pytest.raises(ValueError, match="attention over 1 ranks: 2 query"):
        unified_attention(group, group, (1, 2), (4,))


def _too_few_heads(rank):
    with pytest.raises(ValueError, match="at most 2 ranks are allowed, one head each"):
        UlyssesAttention(Mesh.build(Degrees(ulysses=3)).ulysses, (1, 1, 1), (1, 1, 1))(*random_qkv(1, 1, 1, 2, 8))


def test_more_ranks_than_heads_are_refused(ranks):
    ranks.run(_too_few_heads, ranks=3)
