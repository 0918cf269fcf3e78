"""Unit and multi-rank gloo: the counter of live memory, and the scaling benchmark on a tiny model.

Bytes are exact. No time is compared with another. Outputs of all programs agree within 1e-5 of their range in fp32,
where ranks only add in another order; the benchmark itself refuses to time what does not.
"""

from __future__ import annotations

import json
import os
import threading
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from benchmarks import scaling, scaling_ranks
from benchmarks.memory import LiveMemory
from benchmarks.scaling_ranks import Case, count_flops, peak_bytes, peak_bytes_of_diffusers, pinned, time_ranks
from benchmarks.timing import Ratio, Timing
from helios_cp.config import TransformerConfig
from parallel.mesh import Degrees
from parallel.ulysses import UlyssesAttention
from tests.ranks import RankError, shared_pool

KIB = 256  # fp32 values
# Wide for its depth, so that tokens weigh more than what every rank holds; 64 × 64 pixels are 184 tokens, 46 a rank.
TINY = Case(
    TransformerConfig(
        num_attention_heads=4, attention_head_dim=32, rope_dim=(12, 10, 10), ffn_dim=512, text_dim=32, num_layers=2
    ),
    size=(64, 64),
    text_tokens=8,
)


# The counter.


def test_peak_is_of_what_lives_at_one_time():
    before = torch.zeros(KIB)
    with LiveMemory() as memory:
        first = before + 1
        second = first * 2
        assert memory.live_bytes == memory.peak_bytes == 2048
        del first
        third = second - 1
        assert memory.live_bytes == memory.peak_bytes == 2048
        del second, third
        assert (memory.live_bytes, memory.peak_bytes) == (0, 2048)


def test_memory_lives_as_long_as_a_view_of_it():
    with LiveMemory() as memory:
        whole = torch.zeros(4, KIB)
        rows = whole[1:].view(-1)[:1]
        del whole
        assert memory.live_bytes == 4096
        del rows
        assert memory.live_bytes == 0


def test_what_was_there_before_does_not_count():
    weight, states = torch.zeros(KIB, KIB), torch.zeros(2, KIB)
    with LiveMemory() as memory:
        weight.view(-1).add_(1)
        assert memory.peak_bytes == 0
        out = F.linear(states, weight)
        assert memory.live_bytes == out.nbytes == 2048
        del weight
        assert memory.live_bytes == 2048


def test_intermediate_tensors_inside_an_operation_are_seen():
    states = torch.ones(8, KIB)
    with LiveMemory() as memory:
        normed = F.rms_norm(states, (KIB,))
    assert memory.live_bytes == normed.nbytes < memory.peak_bytes


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch.no_grad\(\)"):
        LiveMemory().__enter__()


# Memory of a forward.


def _peaks(function, *options):
    return [
        shared_pool().run(function, TINY, option, ranks=ranks) for ranks, option in zip((1, 2, 4), options, strict=True)
    ]


def test_activations_fall_with_the_ranks():
    """Exchanged tokens are packed and unpacked, which one rank need not: from 2 ranks on, peaks go as 1/P."""
    for axis in ("ulysses", "ring"):
        (one,), two, four = _peaks(peak_bytes, *(Degrees(**{axis: ranks}) for ranks in (1, 2, 4)))
        assert max(two) < 0.95 * one and max(four) < 0.55 * one
        assert max(four) < 0.65 * max(two)
        assert max(two) == min(two) and max(four) == min(four), "tokens divide, so all ranks hold the same"


def test_activations_of_diffusers_do_not_fall():
    (one,), two, four = _peaks(peak_bytes_of_diffusers, 1, 2, 4)
    assert min(two) > 0.9 * one and min(four) > 0.9 * one
    (ours,) = shared_pool().run(peak_bytes, TINY, Degrees(), ranks=1)
    assert ours < 0.6 * one


def test_our_flops_are_fewer():
    flops = count_flops(TINY)
    assert 0.5 * flops["diffusers"] < flops["ours"] < flops["diffusers"]


# Times.


def _time_wrongly(rank):
    with mock.patch.object(UlyssesAttention, "_to_tokens", lambda attention, out, heads: torch.zeros(1, 92, 4, 32)):
        return time_ranks(rank, TINY, 2, 2, 0)


def test_a_wrong_output_is_not_timed():
    with pytest.raises(RankError, match=r"outputs differ from diffusers' on one rank by \{'ours, Ulysses 2'"):
        shared_pool().run(_time_wrongly, ranks=2)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no threads")
def test_a_pinned_thread_has_a_core_of_its_own_and_is_let_go():
    def check():
        cores = os.sched_getaffinity(0)
        for rank in range(len(cores)):
            with pinned(rank, len(cores)) as is_pinned:
                assert is_pinned and os.sched_getaffinity(0) == {sorted(cores)[rank]}
        with pinned(0, len(cores) + 1) as is_pinned:
            assert not is_pinned
        found.append(os.sched_getaffinity(0) == cores)

    found: list[bool] = []
    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    assert found == [True]


def test_speedups():
    seconds = {"diffusers, 1 rank": 4.5, "ours, 1 rank": 4.0, "diffusers, Ulysses 2": 3.0, "ours, Ulysses 2": 2.0}
    seconds |= {"ours, ring 2": 2.5, "ours, 2 at once": 5.0}
    speedups = {s.what.strip(): s for s in scaling.compare({name: Timing((t, t)) for name, t in seconds.items()})}
    assert speedups["ours, Ulysses 2 over 1 rank"].ratio == Ratio(2.0, (2.0, 2.0))
    assert speedups["ours, Ulysses 2 over 1 rank"].to_json()["met"]
    assert speedups["limit of this machine, 2 at once"].ratio.median == 2 * 4.0 / 5.0
    assert speedups["ours, Ulysses 2, of that limit"].ratio.median == 5.0 / (2 * 2.0)
    assert speedups["diffusers, Ulysses 2 over 1 rank"].ratio.median == 1.5
    assert speedups["ours over diffusers, 1 rank"].ratio.median == 4.5 / 4.0
    assert speedups["ours over diffusers, Ulysses 2"].ratio.median == 1.5


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "CASE", TINY)
    output = tmp_path / "out.json"
    assert scaling.main(["--repeats", "2", "--layers", "2", "--output", str(output)], shared_pool()) == 0
    results = json.loads(output.read_text())["results"]
    assert len(results["times"]) == 6 and all(len(t["seconds"]) == 2 for t in results["times"].values())
    assert max(results["differences"].values()) <= scaling_ranks.TOLERANCE
    assert results["memory"]["ours, ring"].keys() == {"1", "2", "4"}
    assert results["speedups"]["ours over diffusers, Ulysses 2"]["goal"] == 1.15
    printed = capsys.readouterr().out
    assert "limit of this machine" in printed and "Peak MiB" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeats", "1"], "--repeats 1: must be 2 or more"),
        (["--layers", "none"], "--layers: 'none' is no whole number"),
        (["--output", "out.txt"], "--output out.txt"),
    ],
)
def test_bad_arguments_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        scaling.main(flags)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
