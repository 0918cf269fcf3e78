"""Unit: what the planner predicts for Helios-14B, how it ranks layouts, and its command line.

Figures of the cost model of Helios-14B are compared at its own rounding. Times are modelled, so only their order is
tested.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
import torch

from helios_cp.config.checkpoint import Checkpoint, TransformerConfig
from helios_cp.config.errors import RequestError
from helios_cp.config.layout import AskedLayout, Layout, segment_lengths
from helios_cp.config.request import Request
from helios_cp.model.vae.config import VaeConfig
from helios_cp.plan import memory
from helios_cp.plan.__main__ import main
from helios_cp.plan.choose import choose_layout, make_plan
from helios_cp.plan.flags import PlanCall
from helios_cp.plan.forward_cost import Traffic, forward_cost, repeated_flops
from helios_cp.plan.hardware import CPU, H100, PROFILES, RTX4090
from helios_cp.plan.predict import Candidate, limit_fps, message_seconds, predict
from helios_cp.plan.rank_shares import shares
from helios_cp.plan.report import command, stage_counts
from helios_cp.plan.workload import TextEncoderConfig, Workload
from parallel.mesh import Degrees
from tests.plan.workloads import workload

FULL = TransformerConfig()
STAGE_3 = (240, 240, 1920, 8640)
TEXT_TOKENS = 512


# Helios-14B


def test_figures_of_the_cost_model():
    stages = stage_counts(workload())
    assert memory.transformer_parameters(FULL) == 14_312_427_584
    assert [stage["tokens"] for stage in stages] == [2940, 4560, 11040]
    assert [round(stage["diffusers_flops"] / 1e12, 1) for stage in stages] == [69.7, 119.1, 359.6]
    assert [round(stage["flops"] / 1e12, 1) for stage in stages] == [66.5, 115.7, 355.9]
    assert round(workload().decode_flops / 1e12, 1) == 66.1  # 69.3 of diffusers, less what is folded
    assert round(TextEncoderConfig().parameters / 1e9, 2) == 5.68
    assert round(4 * sum(memory.vae_parameters(VaeConfig()).values()) / 1e6) == 508


@pytest.mark.parametrize(("ranks", "ffn_tp", "sharded"), [(2, 23.0, 14.6), (4, 20.1, 7.5), (8, 18.7, 4.0)])
def test_weights_of_a_rank(ranks, ffn_tp, sharded):
    """The cost model takes all parameters for bf16; those kept in fp32 add less than 0.1 GB."""
    split = memory.transformer_bytes(FULL, torch.bfloat16, None, ranks).whole
    shard = memory.sharded_bytes(FULL, torch.bfloat16, ranks).resident
    assert ffn_tp - 0.05 < split / 1e9 < ffn_tp + 0.15 and sharded - 0.05 < shard / 1e9 < sharded + 0.15


@pytest.mark.parametrize(
    ("degrees", "megabytes"),
    [
        (Degrees(ulysses=2), 4523),
        (Degrees(ulysses=4), 3392),
        (Degrees(ulysses=8), 1979),
        (Degrees(ring=2), 4523),
        (Degrees(ring=4), 6784),
        (Degrees(ring=8), 7914),
        (Degrees(ring=2, ulysses=2), 4523),
        (Degrees(ring=2, ulysses=4), 2827),
        (Degrees(ring=2, ulysses=8), 1556),
        (Degrees(ulysses=2, ffn_tp=2), 9045),
        (Degrees(ulysses=8, ffn_tp=8), 9893),
    ],
    ids=str,
)
def test_bytes_sent_at_stage_3(degrees, megabytes):
    """The mean of the ranks; the cost model does not know that the last block's history asks no questions."""
    own = shares(FULL, STAGE_3, degrees)
    sent = sum(forward_cost(FULL, each, degrees, TEXT_TOKENS, 2).total_traffic.sent_bytes for each in own) / len(own)
    crossings = (degrees.ulysses - 1) / degrees.ulysses + degrees.ffn_tp - 1
    pruned = 2 * 2400 * FULL.dim * crossings * 2 / degrees.sequence
    assert (sent + pruned) / 1e6 == pytest.approx(megabytes, abs=0.6)


@pytest.mark.parametrize(("steps", "h100", "h200"), [((1, 1, 1), 48.0, 38.3), ((2, 2, 2), 26.6, 21.2)])
def test_limits_of_one_gpu(steps, h100, h200):
    """The VAE runs on the tensor cores in TF32, at half the rate of bf16; an H200 reaches 790 TFLOP/s."""
    work = workload()
    flops = sum(n * repeated_flops(FULL, stage.lengths, 512) for n, stage in zip(steps, work.stages, strict=True))
    peak = limit_fps(33, flops, work.decode_flops, H100.peak_flops, H100.peak_vae_flops)
    reached = limit_fps(33, flops, work.decode_flops, 790e12, 395e12)
    assert (round(peak, 1), round(reached, 1)) == (h100, h200)


def test_predictions_stay_below_the_limits():
    for name in ("h100", "h200", "a100-80"):
        hardware, work = PROFILES[name], workload(pyramid_num_inference_steps_list=(1, 1, 1))
        flops = sum(stage["flops"] for stage in stage_counts(work))
        bound = limit_fps(33, flops, work.decode_flops, hardware.peak_flops, hardware.peak_vae_flops)
        assert 0.1 * bound < predict(work, Candidate(Layout()), hardware).fps < bound


# Plans


def test_plans_of_up_to_64_ranks_are_made_quickly(monkeypatch):
    """In calls of Python functions, which a busy machine does not change; and with no model of many blocks."""
    work = workload("14b-base", height=1440, width=2560)
    for name in ("predicted_bytes", "empty_model"):
        monkeypatch.setattr(memory, name, shallow(getattr(memory, name)))
    for ranks in (1, 7, 48, 64):
        plan, calls = _with_calls(lambda ranks=ranks: make_plan([work], H100, ranks))
        assert plan.fitting or ranks == 1
        assert len(plan.fitting) + len(plan.refused) < 1000
        assert calls < 1_000_000, "a million take a second or so"


def test_planning_imports_neither_diffusers_nor_a_compiler():
    """Which take longer than planning does; in a fresh interpreter, with all that the command prints."""
    program = (
        "import contextlib, io, sys; from helios_cp.plan.__main__ import main\n"
        "with contextlib.redirect_stdout(io.StringIO()): main(['--gpus', '2'])\n"
        "print(sorted({'diffusers', 'transformers', 'torch._dynamo', 'torch.distributed.fsdp'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def _with_calls(run):
    """What `run` returns, and how many Python functions it called."""
    calls = itertools.count()
    sys.setprofile(lambda frame, event, argument: next(calls) if event == "call" else None)
    try:
        return run(), next(calls)
    finally:
        sys.setprofile(None)


def shallow(build):
    """As `build`, of models of a block or two."""

    def checked(config, *rest):
        assert config.num_layers <= 2
        return build(config, *rest)

    return checked


def test_every_plan_is_accepted_by_the_engine_and_no_other_is(presets):
    """Against what `choose_layout` says to the same flags."""
    checkpoint = Checkpoint.read(presets["random-mid"])
    request = Request(prompt=("a",), height=64, width=64).resolve(checkpoint)
    work = Workload.of(checkpoint, request, torch.float32)
    for ranks in (1, 2, 6, 10):
        plan = make_plan([work], CPU, ranks, {"decoders": 0})
        for candidate, is_possible in [
            *((each.candidate, True) for each in plan.fitting),
            *((each.candidate, False) for each in plan.refused),
        ]:
            degrees = candidate.layout.degrees
            flags = AskedLayout(
                cfg_parallel=degrees.cfg,
                ring=degrees.ring,
                ulysses=degrees.ulysses,
                ffn_tp=degrees.ffn_tp,
                vae_parallel=degrees.vae,
                shard_weights=candidate.layout.shard_weights,
            )
            try:
                chosen = choose_layout(flags, checkpoint, [request], ranks, torch.float32)
            except RequestError:
                assert not is_possible
            else:
                assert is_possible and chosen == candidate.layout


def test_what_does_not_fit_is_marked():
    plan = make_plan([workload()], RTX4090, 4)
    layouts = [each.candidate.layout for each in plan.fitting]
    assert layouts and all(each.shard_weights or each.degrees.ffn_tp > 1 for each in layouts)
    reasons = {each.candidate: each.reason for each in plan.refused}
    replicated = next(reason for each, reason in reasons.items() if each == Candidate(Layout(Degrees(ulysses=4))))
    assert replicated.startswith("memory: ") and "of 24.5 GB" in replicated and "transformer" in replicated
    assert all(each.memory_bytes <= memory.FITTING_SHARE * RTX4090.memory_bytes for each in plan.fitting)
    assert any("no guidance" in reason for reason in reasons.values())


def test_plans_are_sorted_and_told_apart_by_what_they_cost():
    plan = make_plan([workload()], H100, 8)
    speeds = [each.fps for each in plan.fitting]
    assert speeds == sorted(speeds, reverse=True)
    of = {each.candidate: each for each in plan.fitting}
    ulysses, serial, split = (
        of[Candidate(Layout(Degrees(ulysses=8, **rest)))] for rest in ({"vae": 8}, {}, {"ffn_tp": 8, "vae": 8})
    )
    assert ulysses.fps > 2 * serial.fps and serial.dominant == "VAE"  # the VAE is the wall
    assert (
        split.sent_bytes > ulysses.sent_bytes and split.fps < ulysses.fps and split.memory_bytes < ulysses.memory_bytes
    )
    pair = make_plan([workload()], H100, 2).fitting
    equal = [each for each in pair if each.fps == pair[0].fps]  # gathers of weights hide behind the forward
    assert [each.candidate.layout.shard_weights for each in equal] == [False, True]  # what sends less comes first
    decoders = of[Candidate(Layout(Degrees(ulysses=4)), 4)]
    assert decoders.interval < decoders.latency and ulysses.interval == ulysses.latency


def test_zeroed_steps_and_both_branches_are_counted():
    base, mid = workload("14b-base"), workload("14b-mid")
    assert [stage.forwards for stage in base.stages] == [50] and base.branches == 2
    assert [stage.forwards for stage in mid.stages] == [18, 20, 20]  # CFG-Zero* leaves out two


def test_messages_between_nodes_take_the_network():
    within, across = Degrees(ulysses=8), Degrees(ring=2, ulysses=8)
    traffic = Traffic(10, 10**9)
    near = message_seconds(traffic, within, "ulysses", H100)
    assert near == pytest.approx(10 * H100.node_latency + 1e9 / H100.node_bandwidth)
    assert message_seconds(traffic, across, "ulysses", H100) == near
    far = 10 * H100.network_latency + 1e9 / H100.network_bandwidth
    assert message_seconds(traffic, across, "ring", H100) == pytest.approx(far)
    half = message_seconds(traffic, Degrees(ulysses=16), "ulysses", H100)  # 8 of 15 partners are on the other node
    assert half == pytest.approx(10 * H100.network_latency + 8 / 15 * 1e9 / H100.network_bandwidth)


def test_a_batch_needs_more_memory_and_time():
    """Eight prompts do not fit on a card that one fits on."""
    one, eight = (workload(prompt=("a",) * count) for count in (1, 8))
    before, after = (predict(each, Candidate(Layout()), H100) for each in (one, eight))
    assert after.memory_bytes > memory.FITTING_SHARE * H100.memory_bytes > before.memory_bytes
    assert after.memory["working"] == 8 * before.memory["working"]
    assert 6 * before.interval < after.interval < 8 * before.interval
    assert make_plan([eight], H100, 1).fitting == ()


def test_a_request_without_guidance_leaves_half_of_the_ranks_idle():
    layout = Candidate(Layout(Degrees(cfg=2)))
    assert predict(workload(), layout, H100).seconds["products"] > 0


# Command line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--hardware", "tpu"], "--hardware tpu: allowed are h100, h200"),
        (["--height", "100"], "nearest are 64 and 128"),
        (["--gpus", "0"], "--gpus 0: allowed is 1 to"),
        (["--nodes", "many"], "no whole number"),
        (["--top", "0"], "--top 0: at least 1"),
        (["--gpus", "1024", "--nodes", "2"], "at most 1024 ranks"),
        (["--pyramid-steps", "1", "2"], "3 numbers of at least 1"),
        (["--model", "nowhere"], "--model nowhere"),
        (["--num-frames", "0"], "--num-frames 0"),
        (["--dtype", "int4"], "--dtype"),
        (["--layouts"], "unrecognized"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(flags, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(flags)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_table(capsys):
    assert main(["--gpus", "2", "--top", "99"]) == 0
    printed = capsys.readouterr().out
    for text in ("14.312 B parameters", "11040", "all times are modelled", "spatial 2", "1 decoder", "no guidance"):
        assert text in printed
    for text in ("cfg x ring x uly", "GB sent a chunk", "eager", "4 chunks of 33 frames"):
        assert text in printed
    assert main(["--hardware", "rtx4090"]) == 1  # nothing fits
    assert "of 24.5 GB" in capsys.readouterr().out


def test_the_best_layouts_are_printed_and_the_others_counted(capsys):
    assert main(["--gpus", "8", "--top", "3"]) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("│ 1 x ")]
    assert len(rows) == 3 and "slower ones are left out; --top " in printed
    assert main(["--gpus", "8", "--top", "1000"]) == 0
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("candidate", "ranks", "nodes", "typed"),
    [
        (Candidate(Layout()), 1, 1, "python -m helios_cp.generate"),
        (
            Candidate(Layout(Degrees(ulysses=8, vae=8))),
            8,
            1,
            "torchrun --nproc_per_node 8 -m helios_cp.generate --ulysses 8 --vae-parallel 8",
        ),
        (
            Candidate(Layout(Degrees(cfg=2, ring=2, ulysses=4), shard_weights=True)),
            16,
            2,
            "torchrun --nnodes 2 --nproc_per_node 8 -m helios_cp.generate --cfg-parallel 2 --ring 2 --ulysses 4 "
            "--shard-weights --vae-parallel 1",
        ),
        (
            Candidate(Layout(Degrees(ulysses=4, ffn_tp=2)), 4),
            8,
            1,
            "python -m launchers.generate --address auto --ranks 4 --ulysses 4 --ffn-tp 2 --decoders 4",
        ),
    ],
    ids=str,
)
def test_what_to_type_for_a_layout(candidate, ranks, nodes, typed):
    """The programs' own parsers read it back to the same layout."""
    from helios_cp.generate.__main__ import build_parser
    from launchers.generate.__main__ import build_parser as build_cluster_parser

    assert command(candidate, PlanCall(gpus=ranks // nodes, nodes=nodes)) == typed
    flags = typed.partition("generate")[2].split()
    arguments = (build_cluster_parser() if candidate.decoders else build_parser()).parse_args(flags)
    names = {"cfg_parallel": "cfg", "ring": "ring", "ulysses": "ulysses", "ffn_tp": "ffn_tp", "vae_parallel": "vae"}
    degrees = Degrees(**{name: getattr(arguments, flag, 1) for flag, name in names.items()})
    assert Layout(degrees, shard_weights=getattr(arguments, "shard_weights", False)) == candidate.layout
    assert getattr(arguments, "decoders", 0) == candidate.decoders


def test_json(capsys):
    assert main(["--gpus", "4", "--pyramid-steps", "1", "1", "1", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["parameters"] == 14_312_427_584 and "modelled" in values["note"]
    assert round(values["limits"]["fps_at_peak_with_diffusers_transformer"], 1) == 48.0
    best = values["plans"][0]
    assert best["command"].endswith("--ulysses 4 --vae-parallel 4")
    assert best["ulysses"] == 4 and best["stages"][2]["traffic"]["ulysses"]["calls"] == 80
    assert {"flops", "elementwise_bytes", "matrix_bytes", "kernels"} < best["stages"][0].keys()
    assert best["modelled_video_seconds"] > 4 * best["modelled_interval_seconds"]  # the first chunk has twice the steps
    assert values["impossible"][0]["reason"]


def test_a_checkpoint_folder_is_planned_from_its_own_files(presets, capsys):
    folder = presets["random-mid"]
    flags = ["--model", str(folder), "--height", "64", "--width", "64", "--hardware", "cpu", "--dtype", "float32"]
    assert main([*flags, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    checkpoint = Checkpoint.read(folder)
    request = Request(prompt=("a",), height=64, width=64).resolve(checkpoint)
    assert [stage["tokens"] for stage in values["stages"]] == [sum(n) for n in segment_lengths(request, checkpoint)]
    assert values["plans"][0]["memory_bytes"]["VAE"] == 4 * 42_899
