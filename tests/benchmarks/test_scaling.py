"""Unit and multi-rank gloo: the counter of live memory, and the scaling benchmark on a tiny model.

Bytes are exact, but those of diffusers' Ulysses, which are of a run: gloo's thread may let go of a buffer late there.
No time is compared with another. Outputs of all programs agree within 1e-5 of their range in fp32, where ranks only add
in another order; the benchmark itself refuses to time what does not.
"""

from __future__ import annotations

import json
import os
import threading
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measuring.memory import LiveMemory
from benchmarks.measuring.timing import Ratio, Timing
from benchmarks.models.communication_formulas import DTYPE, Tokens, predict_ours
from benchmarks.models.models import run_theirs
from benchmarks.ranks.groups import pinned
from benchmarks.ranks.pool import RankError, shared_pool
from benchmarks.report.data import read_results
from benchmarks.report.sections import scaling_section
from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling import ranks as scaling_ranks
from benchmarks.scaling.__main__ import measure_world
from benchmarks.scaling.memory import peak_bytes, peak_bytes_of_diffusers, peak_bytes_of_ulysses
from benchmarks.scaling.ranks import TOLERANCE, Case, Times, build, count_flops, sequence_program, time_ranks
from benchmarks.scaling.world import GOALS, WorldTimes, compare
from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.model.sequence import TokenSequence
from helios_cp.plan.forward_cost import Traffic
from parallel.collectives import Group
from parallel.mesh import Degrees
from parallel.ulysses import UlyssesAttention

CPU = torch.device("cpu")
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


def peaks_of(axis: str, ranks: int) -> list[int]:
    """Of every rank."""
    degrees = Degrees(**{axis: ranks})
    return [peak_bytes(TINY, degrees, rank, torch.float32) for rank in range(ranks)]


def run_on_cpu(ours: bool) -> int:
    """The peak of a forward that is computed, on one rank."""
    theirs, model, inputs = build(TINY, CPU, torch.float32)
    run = sequence_program(model, inputs, TokenSequence()) if ours else lambda: run_theirs(theirs, inputs)
    run()
    with LiveMemory() as memory:
        run()
    return memory.peak_bytes


def test_what_is_counted_on_meta_is_what_a_run_takes():
    assert peak_bytes(TINY, Degrees(), 0, torch.float32) == run_on_cpu(ours=True)
    assert peak_bytes_of_diffusers(TINY, torch.float32) == run_on_cpu(ours=False)


@pytest.mark.parametrize(("axis", "of_two", "of_four"), [("ulysses", 0.65, 0.36), ("ring", 0.62, 0.4)])
def test_activations_fall_with_the_ranks(axis, of_two, of_four):
    """As 1/P and what text, modulation and the other ranks' parts take, which weigh more with fewer tokens."""
    (one,), two, four = (peaks_of(axis, ranks) for ranks in (1, 2, 4))
    assert len(set(two)) == len(set(four)) == 1, "tokens divide, so all ranks hold the same"
    assert two == peaks_of(axis, 2), "the same every time"
    assert 1 / 2 < two[0] / one < of_two and 1 / 4 < four[0] / one < of_four


def test_a_buffer_that_is_held_too_long_shows(monkeypatch):
    """As a mistake to be seen: what is sent to the other rank lives on through the attention."""
    held: list[torch.Tensor] = []
    sent = Group.all_to_all

    def hold(group, tensor, *lengths):
        held[:] = [*held[-2:], tensor]
        return sent(group, tensor, *lengths)

    right = peaks_of("ulysses", 2)
    monkeypatch.setattr(Group, "all_to_all", hold)
    assert min(peaks_of("ulysses", 2)) > 1.1 * max(right)


def _ulysses_of_diffusers(rank, ranks):
    return peak_bytes_of_ulysses(TINY, ranks, CPU)


def test_activations_of_diffusers_do_not_fall():
    one = peak_bytes_of_diffusers(TINY, torch.float32)
    for ranks in (2, 4):
        assert min(shared_pool().run(_ulysses_of_diffusers, ranks, ranks=ranks)) > 0.9 * one
    assert peak_bytes(TINY, Degrees(), 0, torch.float32) < 0.45 * one


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


def test_speedups_and_efficiency():
    seconds = {"diffusers, 1 rank": 4.5, "ours, 1 rank": 4.0, "diffusers, Ulysses 2": 3.0, "ours, Ulysses 2": 2.0}
    seconds |= {"ours, ring 2": 2.5, "ours, 2 at once": 5.0}
    timings = {name: Timing((t, t)) for name, t in seconds.items()}
    speedups = {each.what: each for each in compare(timings, 2, GOALS)}
    assert speedups["ours, Ulysses 2 over 1 rank"].ratio == Ratio(2.0, (2.0, 2.0))
    assert speedups["ours, Ulysses 2 over 1 rank"].to_json()["met"]
    assert speedups["ours, ring 2 over 1 rank"].ratio.median == 4.0 / 2.5
    assert speedups["limit of this machine, 2 at once"].ratio.median == 2 * 4.0 / 5.0
    assert speedups["ours, Ulysses 2, of that limit"].ratio.median == 5.0 / (2 * 2.0)
    assert speedups["diffusers, Ulysses 2 over 1 rank"].ratio.median == 1.5
    assert speedups["ours over diffusers, 1 rank"].ratio.median == 4.5 / 4.0
    assert speedups["ours over diffusers, Ulysses 2"].ratio.median == 1.5
    traffic = [{"ours, Ulysses 2": (3, sent)} for sent in (100, 300)]
    times = Times(timings, {}, {}, traffic[0], is_pinned=True)
    world = WorldTimes.of(2, times, traffic, {}, [0.0, 0.0], goals={})
    assert world.efficiency == {"diffusers, Ulysses 2": 0.75, "ours, Ulysses 2": 1.0, "ours, ring 2": 0.8}
    assert world.of_limit == {"ours, Ulysses 2": 1.25, "ours, ring 2": 1.0}
    assert world.sent_bytes == {"ours, Ulysses 2": 200.0} and world.collectives == {"ours, Ulysses 2": 3}
    assert all(each["goal"] is None for each in world.speedups.values())


def test_every_layout_is_timed_and_metered():
    found = shared_pool().run(measure_world, TINY, 4, 2, 0, ranks=4)
    assert found[1:] == [None] * 3
    world = found[0]
    layouts = ("Ulysses 4", "ring 4", "Ulysses 2 × ring 2")
    assert set(world.efficiency) == {"diffusers, Ulysses 4", *(f"ours, {name}" for name in layouts)}
    assert "diffusers, ulysses_anything 4" in world.times
    assert max(world.differences.values()) <= TOLERANCE[torch.float32]
    tokens = Tokens.of(TINY.size, TINY.stage)
    for name, degrees in zip(layouts, scaling_ranks.layouts(4).values(), strict=True):
        predicted = sum(predict_ours(TINY.config, tokens, degrees).values(), Traffic())
        fp32 = 4 / DTYPE.itemsize
        assert world.collectives[f"ours, {name}"] == predicted.calls
        assert 4 * world.sent_bytes[f"ours, {name}"] == fp32 * predicted.sent_bytes
    assert world.collectives["diffusers, Ulysses 4"] == 7 * TINY.config.num_layers
    assert world.peak_bytes["ours, Ulysses 4"] < world.peak_bytes["ours, 1 rank"]


def test_command_line_through_torchrun(tmp_path, capsys):
    output = tmp_path / "scaling.json"
    flags = ["--repeats", "2", "--layers", "1", "--heads", "2", "--height", "64", "--width", "64", "--ranks", "2"]
    assert scaling.main([*flags, "--output", str(output)]) == 0
    results = json.loads(output.read_text())["results"]
    world = results["worlds"]["2"]
    assert len(world["times"]) == 7 and all(len(each["seconds"]) == 2 for each in world["times"].values())
    assert world["collectives"]["ours, Ulysses 2"] == 3 and world["sent_bytes"]["ours, ring 2"] > 0
    assert world["peak_bytes"]["ours, Ulysses 2"] < world["peak_bytes"]["diffusers, Ulysses 2"]
    printed = capsys.readouterr().out
    assert "limit of this machine" in printed and "peak MiB" in printed
    found, problems = read_results(tmp_path)
    assert not problems and "| ours, Ulysses 2 |" in scaling_section(found["scaling"])


def test_a_world_that_fails_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "run_torchrun", lambda size, arguments: None)
    assert scaling.main(["--ranks", "2", "--output", str(tmp_path / "out.json")]) == 1
    assert "the world of 2 ranks failed" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeats", "1"], "--repeats 1: allowed is 2 to 1000"),
        (["--layers", "none"], "--layers: 'none' is no whole number"),
        (["--ranks", "1"], "--ranks 1: allowed is 2 to 64"),
        (["--ranks", "4", "--heads", "6"], "--ranks 4: diffusers' context parallelism must divide the 6 heads"),
        (["--height", "100"], "--height 100: allowed are multiples of 64"),
        (["--output", "out.txt"], "--output out.txt"),
    ],
)
def test_bad_arguments_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        scaling.main(flags)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
