"""Unit and multi-rank gloo: what the ranks of a forward send each other, in bytes and calls, and the formulas for it.

Everything is exact. Most counts are of a small video, whose 9 noisy and 49 tokens no number of ranks here divides; one
is on the real token counts. The formulas are tied to the cost model of Helios-14B, which rounds to whole megabytes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.distributed._functional_collectives import all_reduce

from benchmarks.communication import __main__ as communication
from benchmarks.communication.counts import (
    NARROW,
    at_full_size,
    count_ours,
    count_theirs,
    counts_of_ours,
    counts_of_theirs,
)
from benchmarks.models.communication_formulas import DTYPE, Tokens, Traffic, predict_ours, predict_theirs
from benchmarks.models.diffusers_parallel import FunctionalCollectives
from benchmarks.models.forward_counts import SIZE
from benchmarks.ranks.pool import shared_pool
from helios_cp.config.checkpoint import TransformerConfig
from parallel.collectives import Group, Meter
from parallel.mesh import Degrees

FULL = TransformerConfig()
SMALL = (64, 64)
LAYOUTS = (
    Degrees(),
    Degrees(ulysses=2),
    Degrees(ring=2),
    Degrees(ulysses=2, ffn_tp=2),
    Degrees(cfg=2),
    Degrees(ulysses=4),
    Degrees(ring=4),
    Degrees(ring=2, ulysses=2),
    Degrees(ring=2, ulysses=2, ffn_tp=2),
    Degrees(cfg=2, ulysses=2),
)


def _total(traffic):
    return sum(traffic.values(), Traffic())


# Formulas.


def test_tokens_of_helios():
    assert [Tokens.of(SIZE, stage) for stage in (1, 2, 3)] == [Tokens(2400, n) for n in (540, 2160, 8640)]
    assert Tokens.of(SMALL, 1) == Tokens(40, 9)


@pytest.mark.parametrize(("ranks", "megabytes"), [(2, 10813), (4, 12829), (8, 12988)])
def test_diffusers_as_in_the_cost_model(ranks, megabytes):
    total = _total(predict_theirs(FULL, Tokens.of(SIZE, 3), ranks))
    assert (round(total.sent_bytes / ranks / 1e6), total.calls) == (megabytes, 280)


@pytest.mark.parametrize(
    ("degrees", "megabytes", "calls"),
    [
        (Degrees(ulysses=2), 4523, 81),
        (Degrees(ulysses=4), 3392, 81),
        (Degrees(ulysses=8), 1979, 81),
        (Degrees(ring=2), 4523, 41),
        (Degrees(ring=4), 6784, 121),
        (Degrees(ring=8), 7914, 281),
        (Degrees(ring=2, ulysses=2), 4523, 121),
        (Degrees(ring=2, ulysses=4), 2827, 121),
        (Degrees(ulysses=2, ffn_tp=2), 9045, 161),
        (Degrees(ulysses=4, ffn_tp=4), 10175, 161),
        (Degrees(ulysses=8, ffn_tp=8), 9893, 161),
        (Degrees(cfg=2), 1, 1),
    ],
    ids=str,
)
def test_ours_as_in_the_cost_model_less_the_pruned_history_of_the_last_block(degrees, megabytes, calls):
    tokens = Tokens.of(SIZE, 3)
    total = _total(predict_ours(FULL, tokens, degrees))
    crossings = (degrees.ulysses - 1) / degrees.ulysses + (degrees.ffn_tp - 1)
    pruned = 2 * tokens.history * FULL.dim * crossings * DTYPE.itemsize / degrees.sequence
    assert (round((total.sent_bytes / degrees.world + pruned) / 1e6), total.calls) == (megabytes, calls)


@pytest.mark.parametrize(("ranks", "times"), [(4, 3.7), (8, 6.5)])
def test_ulysses_sends_far_less_than_diffusers(ranks, times):
    tokens = Tokens.of(SIZE, 3)
    ours = _total(predict_ours(FULL, tokens, Degrees(ulysses=ranks)))
    assert times * ours.sent_bytes <= _total(predict_theirs(FULL, tokens, ranks)).sent_bytes


def test_heads_that_do_not_divide_have_no_formula():
    with pytest.raises(ValueError, match="ulysses 3: must divide the 40 heads"):
        predict_ours(FULL, Tokens.of(SIZE, 3), Degrees(ulysses=3))


# Counts.


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_ours_sends_what_the_formula_says(degrees):
    for count in counts_of_ours(shared_pool(), degrees, FULL, SMALL, (1, 3)).values():
        assert count.is_as_predicted and (count.max_bytes > 0) == (degrees.world > 1)


def test_on_the_real_tokens():
    degrees = Degrees(ring=2, ulysses=2)
    assert counts_of_ours(shared_pool(), degrees, FULL, SIZE, (1,))[1].is_as_predicted


@pytest.mark.parametrize("ranks", [2, 4])
def test_diffusers_sends_what_the_formula_says_or_refuses(ranks):
    counts = counts_of_theirs(shared_pool(), ranks, FULL, SMALL, (1, 2))
    assert "must be divisible" in counts[1]
    assert counts[2].is_as_predicted and counts[2].calls == 280


@pytest.mark.parametrize("ranks", [2, 3])
def test_diffusers_takes_uneven_ranks_by_ulysses_anything(ranks):
    """It sends what its plain Ulysses does, tells the ranks' sizes besides, and needs no tokens that divide."""
    counts = counts_of_theirs(shared_pool(), ranks, FULL, SMALL, (1, 2), "ulysses_anything")
    for count in counts.values():
        assert count.calls == 280 + 7 * 40 and all(rank["sizes"].calls == 280 for rank in count.ranks)
    if ranks == 2:
        plain = counts_of_theirs(shared_pool(), ranks, FULL, SMALL, (2,))[2]
        assert [rank["context"] for rank in counts[2].ranks] == [rank["context"] for rank in plain.ranks]


def test_plain_ulysses_of_diffusers_refuses_heads_that_do_not_divide():
    assert "40 heads do not divide by 3" in counts_of_theirs(shared_pool(), 3, FULL, SMALL, (2,))[2]


def test_diffusers_has_no_ring_on_a_cpu():
    counts = counts_of_theirs(shared_pool(), 2, FULL, SMALL, (2,), "ring_anything")
    assert "return_lse" in counts[2]


def test_depth_and_width_are_scaled_exactly():
    full = replace(NARROW, num_layers=5, attention_head_dim=16, rope_dim=(8, 4, 4))
    two, three = (replace(NARROW, num_layers=layers) for layers in (2, 3))
    for count, how in ((count_ours, Degrees(ring=2, ulysses=2, ffn_tp=4)), (count_theirs, 4)):
        for rank in shared_pool().run(count, (two, three, full), SMALL, (2,), how, ranks=4):
            assert at_full_size(rank[2, two], rank[2, three], NARROW, full) == rank[2, full]
    with pytest.raises(ValueError, match="do not scale"):
        at_full_size({"ring": Traffic(1, 1)}, {"ring": Traffic(2, 2)}, NARROW, replace(NARROW, num_attention_heads=9))


def _count_sending_twice(rank, *arguments):
    once = Group.all_to_all

    def twice(group, *pieces, **options):
        once(group, *pieces, **options)
        return once(group, *pieces, **options)

    with mock.patch.object(Group, "all_to_all", twice):
        return count_ours(rank, *arguments)


def test_a_wasteful_exchange_is_seen():
    degrees = Degrees(ulysses=2)
    found = shared_pool().run(_count_sending_twice, (NARROW,), SMALL, (2,), degrees, ranks=2)
    predicted = predict_ours(NARROW, Tokens.of(SMALL, 2), degrees)["ulysses"]
    assert [rank[2, NARROW]["ulysses"].calls for rank in found] == [2 * predicted.calls] * 2
    assert sum(rank[2, NARROW]["ulysses"].sent_bytes for rank in found) == 2 * predicted.sent_bytes


def _unknown_collective(rank):
    meter = Meter()
    with pytest.raises(RuntimeError, match="collective all_reduce"), FunctionalCollectives(meter):
        all_reduce(torch.ones(2), "sum", group=list(range(2)))
    return meter.total_calls


def test_a_collective_that_the_meter_does_not_know_is_not_passed_over():
    assert shared_pool().run(_unknown_collective, ranks=2) == [0, 0]


# Command line.


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(communication, "SIZE", SMALL)
    monkeypatch.setattr(communication, "LAYOUTS", {2: (Degrees(ulysses=2), Degrees(cfg=2))})
    monkeypatch.setattr(communication, "LESS_THAN_DIFFUSERS", {2: 2.0})
    output = tmp_path / "out.json"
    assert communication.main(["--output", str(output)], shared_pool()) == 0
    results = json.loads(output.read_text())["results"]
    assert all(goal["met"] for goal in results["goals"]) and results["goals"][1]["found"] == 81
    counts = results["counts"]["2 ranks"]
    assert "divisible" in counts["diffusers"]["stage 1"]["fails"]
    assert counts["CFG 2"]["stage 3"]["axes"]["cfg"] == {"calls": 1, "bytes_of_ranks": [2 * 144 * 64] * 2}
    printed = capsys.readouterr().out
    assert "All counts are as predicted" in printed and "met" in printed

    monkeypatch.setattr(communication, "LESS_THAN_DIFFUSERS", {2: 1000.0})
    assert communication.main(["--output", str(output)], shared_pool()) == 1
    assert "MISSED" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--output", "out.txt"], ["--ranks", "5"], ["--ranks", "two"]])
def test_bad_arguments_are_one_line(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        communication.main(flags)
    error = capsys.readouterr().err
    assert flags[0] in error and flags[1] in error and error.count("\n") == 1
