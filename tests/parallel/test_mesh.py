"""Unit and multi-rank gloo: degrees and their refusals, rank arithmetic, and the groups made from a layout."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from parallel.collectives import Meter
from parallel.degrees import Degrees, default_degrees, layouts
from parallel.mesh import AXES, Mesh, axis_groups, position

HELIOS = {"heads": 40, "smallest_tokens": 2940}


def test_ranks_are_numbered_with_cfg_outermost_and_ulysses_innermost():
    degrees = Degrees(cfg=2, ring=2, ulysses=2, ffn_tp=4, vae=2)
    assert axis_groups(degrees, "world") == (tuple(range(8)),)
    assert axis_groups(degrees, "cfg") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert axis_groups(degrees, "sequence") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert axis_groups(degrees, "ring") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert axis_groups(degrees, "ulysses") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert axis_groups(degrees, "ffn_tp") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert axis_groups(degrees, "vae") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert position(degrees, "ring", 6) == ((4, 6), 1)


@given(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5))
def test_groups_of_every_axis_partition_the_world(cfg, ring, ulysses):
    degrees = Degrees(cfg, ring, ulysses, ffn_tp=ring * ulysses, vae=ulysses)
    for axis in AXES:
        groups = axis_groups(degrees, axis)
        assert sorted(rank for group in groups for rank in group) == list(range(degrees.world))
    for rank in range(degrees.world):
        c, r, u = (position(degrees, axis, rank)[1] for axis in ("cfg", "ring", "ulysses"))
        assert rank == (c * ring + r) * ulysses + u
        assert position(degrees, "sequence", rank)[1] == r * ulysses + u


@given(st.integers(1, 64), st.booleans(), st.integers(1, 48), st.integers(1, 40))
def test_default_layout_passes_its_own_check(world, guidance, heads, tokens):
    halved = guidance and world % 2 == 0
    if world <= tokens or (halved and world // 2 <= tokens):
        degrees = default_degrees(world, guidance, heads, tokens)
        degrees.check(world, guidance=guidance, heads=heads, smallest_tokens=tokens)
        assert degrees.cfg == (2 if halved else 1)
    else:
        with pytest.raises(ValueError, match=f"no layout of {world} ranks works"):
            default_degrees(world, guidance, heads, tokens)


@pytest.mark.parametrize(
    ("world", "guidance", "heads", "expected"),
    [
        (1, True, 40, Degrees()),
        (8, False, 40, Degrees(ulysses=8)),
        (8, True, 40, Degrees(cfg=2, ulysses=4)),
        (7, True, 40, Degrees(ulysses=7)),
        (8, False, 4, Degrees(ring=2, ulysses=4)),
        (6, False, 4, Degrees(ring=2, ulysses=3)),
        (7, False, 4, Degrees(ring=7)),
        (64, False, 40, Degrees(ring=2, ulysses=32)),
    ],
)
def test_default_layout(world, guidance, heads, expected):
    assert default_degrees(world, guidance, heads, 540) == expected


@pytest.mark.parametrize(("rows", "expected"), [(None, 1), (48, 8), (7, 4), (1, 1)])
def test_default_splits_the_vae_as_far_as_its_rows_allow(rows, expected):
    assert default_degrees(8, False, 40, 540, vae_rows=rows).vae == expected


@pytest.mark.parametrize(
    ("degrees", "world", "limits", "message"),
    [
        (
            Degrees(ring=2, ulysses=3),
            8,
            HELIOS,
            "cfg 1 ring 2 ulysses 3: cfg · ring · ulysses is 6 but must equal the world size 8; nearest that work: "
            "cfg 1 ring 2 ulysses 4 or ",
        ),
        (Degrees(ulysses=6), 6, {"heads": 4}, "ulysses 6: at most 4 is allowed, .*: cfg 1 ring 2 ulysses 3 or "),
        (Degrees(cfg=2, ulysses=2), 4, {"guidance": False}, "cfg 2: allowed is 1, as there is no guidance; nearest "),
        (Degrees(cfg=3, ulysses=2), 6, {}, "cfg 3: allowed is 1 or 2; nearest that work: cfg 2 ring 1 ulysses 3 or "),
        (
            Degrees(ulysses=8),
            8,
            {"smallest_tokens": 6},
            "ring 1 · ulysses 8: at most 6 sequence ranks are allowed, .*; nearest that work: cfg 2 ring 1 ulysses 4",
        ),
        (Degrees(ulysses=7), 7, {"smallest_tokens": 6}, "no layout of 7 ranks works .* that does is 6"),
        (
            Degrees(ulysses=6, ffn_tp=4),
            6,
            {},
            "ffn_tp 4: must divide or equal .* group of 6 .*; allowed are 1, 2, 3, 6",
        ),
        (Degrees(ulysses=6, vae=5), 6, {}, "vae 5: must divide or equal .*; allowed are 1, 2, 3, 6"),
        (
            Degrees(ulysses=6, vae=6),
            6,
            {"vae_rows": 5},
            "vae 6: must divide or equal .* be at most 5, the rows of its coarsest grid; allowed are 1, 2, 3$",
        ),
    ],
)
def test_impossible_layout_is_refused_with_the_nearest_that_work(degrees, world, limits, message):
    with pytest.raises(ValueError, match=message) as caught:
        degrees.check(world, **({"guidance": True, **HELIOS} | limits))
    assert "\n" not in str(caught.value)


def test_offered_layouts_all_work():
    for degrees in layouts(12, True, 5, 40):
        degrees.check(12, guidance=True, heads=5, smallest_tokens=40)
        assert degrees.ulysses <= 5


def test_degree_below_one_is_refused():
    with pytest.raises(ValueError, match="ring 0: at least 1 is allowed"):
        Degrees(ring=0)


def test_one_rank_makes_no_process_group():
    mesh = Mesh.build(Degrees())
    assert not dist.is_initialized()
    assert all(getattr(mesh, axis).process_group is None for axis in AXES)
    assert torch.equal(mesh.sequence.all_gather(torch.ones(2), [2], 0)[0], torch.ones(2))
    with pytest.raises(ValueError, match="take 2 ranks, but 1 are running"):
        Mesh.build(Degrees(ring=2))


def _gathered_ranks(rank, degrees):
    """On every axis, the global ranks found in this rank's group by communication."""
    mesh = Mesh.build(degrees, meter=Meter())
    own = torch.tensor([rank])
    found = {}
    for axis in AXES:
        group = getattr(mesh, axis)
        found[axis] = tuple(int(part) for part in group.all_gather(own, [1] * group.size, 0))
    return found


@pytest.mark.parametrize(
    "degrees",
    [
        Degrees(cfg=2, ring=2, ulysses=2, ffn_tp=2, vae=4),
        Degrees(ring=3, ulysses=2, ffn_tp=3, vae=2),
        Degrees(cfg=2, ulysses=3),
        Degrees(ulysses=5, ffn_tp=5, vae=5),
    ],
    ids=str,
)
def test_groups_communicate_within_their_axis(ranks, degrees):
    for rank, found in enumerate(ranks.run(_gathered_ranks, degrees, ranks=degrees.world)):
        assert found == {axis: position(degrees, axis, rank)[0] for axis in AXES}
