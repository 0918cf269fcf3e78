"""Unit and multi-rank: the FPS benchmark on a tiny model, and models of random weights.

FLOPs are exact. Times are compared with nothing; what is made of them is arithmetic, exact to the rounding of a float.
Latents of ours and diffusers' agree within 1e-4 of their size in fp32, as they do for checkpoints.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.fps import __main__ as fps
from benchmarks.fps import measure as fps_measure
from benchmarks.fps.cost import ChunkFlops, Limit, StageFlops, chunk_flops
from benchmarks.fps.measure import Measured, Rates, Subject, check_equal, frames_for, setting_request, take_turns
from benchmarks.fps.videos import ChunkTimes, OurVideo, PeerVideo, repaired
from benchmarks.measuring.counting import FLOP_FORMULAS
from benchmarks.models import full_size
from benchmarks.ranks.pool import shared_pool
from helios_cp.config.errors import RequestError
from helios_cp.config.layout import Layout
from helios_cp.config.sampling_plan import SamplingPlan
from helios_cp.pipeline import pipeline as module
from helios_cp.pipeline.world import Ranks
from helios_cp.plan.memory import transformer_parameters
from helios_cp.plan.predict import Workload
from parallel.mesh import Degrees, Mesh

CPU = torch.device("cpu")
TINY = {"height": 64, "width": 64, "max_sequence_length": 8}
LIGHT = {"tiny": "distilled-111", "tiny-mid": "mid", "tiny-base": "base"}


def build(name: str, **options):
    checkpoint = full_size.named_checkpoint(name)
    return full_size.build_random(checkpoint, Mesh.build(Degrees()), dtype=torch.float32, device=CPU, **options)


def light_request(name: str, chunks: int):
    """Few steps, for a test."""
    checkpoint = full_size.named_checkpoint(name)
    request = setting_request(LIGHT[name], checkpoint, num_frames=frames_for(chunks, 0), **TINY)
    if checkpoint.is_pyramid:
        return replace(request, pyramid_num_inference_steps_list=(3, 1, 1))
    return replace(request, num_inference_steps=2)


def start_videos(name: str, folder: Path, chunks: int = 2):
    """Ours and diffusers' over the same weights, to be closed by `take_turns`."""
    ours = build(name)
    request = light_request(name, chunks)
    inputs = full_size.random_inputs(ours.checkpoint, request, torch.float32)
    peer = full_size.build_peer(ours)
    plan = SamplingPlan.of(request, ours.checkpoint)
    videos = {
        "diffusers": lambda: PeerVideo(peer, request, inputs, plan, folder / "theirs.mp4"),
        "ours": lambda: OurVideo(ours, request, inputs, folder / "ours.mp4"),
    }
    return ours, peer, videos


# Models


def test_full_size_is_that_of_the_planner():
    assert transformer_parameters(full_size.SIZES["14b"].transformer) == 14_312_427_584
    assert full_size.named_checkpoint("14b-mid").is_cfg_zero_star
    assert full_size.named_checkpoint("14b-base").variant == "base"


def test_random_weights_are_never_zero_and_in_the_dtypes_of_a_checkpoint():
    model = build("tiny").transformer
    for name, parameter in model.cast(torch.bfloat16).named_parameters():
        assert parameter.float().abs().max() > 0 and parameter.isfinite().all(), name
    drawn = full_size.random_transformer(model.config, torch.bfloat16, CPU, CPU)
    for name, parameter in drawn.named_parameters():
        assert parameter.dtype == (torch.float32 if model.keeps_fp32(name) else torch.bfloat16), name
        assert (parameter == 0).float().mean() < 0.01, name


def test_weights_are_the_same_wherever_they_are_drawn():
    one, two = build("tiny"), build("tiny")
    for mine, other in zip(one.transformer.parameters(), two.transformer.parameters(), strict=True):
        assert mine.equal(other)


def test_pipelines_share_the_memory_of_weights_and_nothing_else():
    ours = build("tiny")
    other = build("tiny", like=ours.transformer)
    peer = full_size.build_peer(ours)
    held = {p.untyped_storage().data_ptr() for p in ours.transformer.parameters()}
    for model in (other.transformer, peer.transformer):
        assert {p.untyped_storage().data_ptr() for p in model.parameters()} == held
    assert not any(p.is_meta for p in (*peer.transformer.parameters(), *peer.transformer.buffers()))
    weight = other.transformer.blocks[0].ffn.net[0].proj
    weight.weight = torch.nn.Parameter(torch.zeros_like(weight.weight), requires_grad=False)
    assert ours.transformer.blocks[0].ffn.net[0].proj.weight.any()


@pytest.mark.parametrize("name", LIGHT)
def test_ours_and_diffusers_make_the_same_video(name, tmp_path):
    """So that the comparison is of equal work; chunk 1 has a history of chunk 0."""
    _, peer, videos = start_videos(name, tmp_path)
    with repaired(peer):
        running = {each: start() for each, start in videos.items()}
        for _ in range(2):
            (_, theirs), (_, ours) = running["diffusers"].chunk(), running["ours"].chunk()
            assert fps_measure.difference(ours, theirs) < 1e-4
        for video in running.values():
            video.close()
    assert not running["diffusers"]._thread.is_alive(), "a video that is given up ends"
    assert (tmp_path / "ours.mp4").stat().st_size > 0 and (tmp_path / "theirs.mp4").stat().st_size > 0


def test_other_work_is_not_compared(tmp_path, monkeypatch):
    """The first chunk has no history to speak of; what differs is the place of the noisy frames."""
    split = module.split_history

    def shifted(state, request):
        history, noisy = split(state, request)
        return history, tuple(index + 1 for index in noisy)

    monkeypatch.setattr(module, "split_history", shifted)
    _, peer, videos = start_videos("tiny", tmp_path)
    with repaired(peer):
        measured = take_turns(videos, chunks=1, warmup=0, with_alone=False)
    with pytest.raises(RuntimeError, match=r"ours: latents differ from diffusers' by .*; this is other work"):
        check_equal(measured, ["ours"])


# What a chunk costs


def as_given(formula):
    """A formula that torch's counter is to call with tensors, as those of its own registry are."""

    def count(*args, **kwargs):
        return formula(*args, **kwargs)

    count._get_raw = True
    return count


# Kernels that torch's registry lacks: the one that stands in for flash attention on a CPU, and oneDNN's convolutions.
CPU_KERNELS = {
    each: as_given(formula)
    for each, formula in FLOP_FORMULAS.items()
    if "for_cpu" in str(each) or "mkldnn" in str(each)
}


class CountedCalls:
    """FLOPs, by torch's own counter, of all calls of a method while in place."""

    def __init__(self, monkeypatch, owner, method: str) -> None:
        self.flops = self.calls = 0
        original = getattr(owner, method)

        def counted(*args, **kwargs):
            with FlopCounterMode(display=False, custom_mapping=CPU_KERNELS) as counter:
                result = original(*args, **kwargs)
            self.flops += counter.get_total_flops()
            self.calls += 1
            return result

        monkeypatch.setattr(owner, method, counted)


@pytest.mark.parametrize("name", LIGHT)
def test_flops_of_a_chunk_are_those_of_torchs_counter(name, tmp_path, monkeypatch):
    ours, peer, videos = start_videos(name, tmp_path)
    request = light_request(name, 2)
    workload = Workload.of(ours.checkpoint, request, torch.float32)
    flops = chunk_flops(workload, request, ours.checkpoint)
    with repaired(peer):
        running = {each: start() for each, start in videos.items()}
        for video in running.values():
            video.chunk()
        forwards = CountedCalls(monkeypatch, ours.transformer, "forward")
        decodes = CountedCalls(monkeypatch, ours.codec, "_decode")
        theirs = CountedCalls(monkeypatch, peer.transformer, "forward")
        for video in running.values():
            video.chunk()
        for video in running.values():
            video.close()
    assert forwards.flops == flops.denoise and forwards.calls == sum(stage.forwards for stage in flops.stages)
    assert theirs.flops == flops.peer_denoise and theirs.calls == sum(stage.peer_forwards for stage in flops.stages)
    assert decodes.flops == flops.decode and decodes.calls == 1


def test_full_size_costs_what_the_cost_model_says():
    checkpoint = full_size.named_checkpoint("14b")
    for setting, peta in (("distilled-111", 0.548), ("distilled-222", 1.097)):
        request = setting_request(setting, checkpoint)
        flops = chunk_flops(Workload.of(checkpoint, request, torch.bfloat16), request, checkpoint)
        assert flops.peer_denoise / 1e15 == pytest.approx(peta, abs=6e-4)
        assert flops.decode / 1e12 == pytest.approx(66.1, abs=0.05)


# Arithmetic


FLOPS = ChunkFlops((StageFlops(100, 2, 300, 3, 400),), decode=500)


def made_up(totals: list[float]) -> Measured:
    chunks = [ChunkTimes(total, 0.9 * total, {"denoise": 0.5, "decode": 0.25, "encode": 0.1}) for total in totals]
    return Measured(ChunkTimes(9.0, 9.0, {}), chunks, torch.ones(3))


def subject(**degrees: int) -> Subject:
    request = setting_request("distilled-111", full_size.named_checkpoint("tiny"))
    return Subject(request, FLOPS, Rates(transformer=2400.0, vae=4000.0), Layout(Degrees(**degrees)))


def test_fps_is_frames_over_the_median_of_seconds():
    values = subject().program_json("ours", made_up([1.0, 2.0, 4.0]))
    assert values["fps"] == 33 / 2.0
    assert values["fps_quartiles"] == [33 / 3.0, 33 / 1.5]
    assert values["fps_without_mp4"] == 33 / 1.8
    assert values["first_chunk"]["total"] == 9.0


def test_rates_and_their_share_of_the_gemm_rate():
    """600 FLOP of denoising in 0.5 s are 1200 a second, half of what the device reaches; diffusers does more work."""
    ours, theirs = (subject().program_json(name, made_up([1.0, 1.0])) for name in ("ours", "diffusers"))
    assert ours["flops_per_second_and_rank"] == {"denoise": 1200.0, "decode": 2000.0}
    assert ours["percent_of_gemm_rate"] == {"denoise": 50.0, "decode": 50.0}
    assert theirs["percent_of_gemm_rate"] == {"denoise": 100.0, "decode": 50.0}
    spread = subject(ulysses=4, vae=2).program_json("ours", made_up([1.0, 1.0]))
    assert spread["flops_per_second_and_rank"] == {"denoise": 300.0, "decode": 1000.0}


def test_decoding_alone_gives_the_rate_where_it_overlaps():
    found = made_up([1.0, 1.0])
    found.alone = {"decode": 0.125, "transfer": 0.01}
    values = subject().program_json("ours", found)
    assert values["flops_per_second_and_rank"]["decode"] == 4000.0 and values["alone_seconds"] == found.alone


def test_limit_at_the_gemm_rate():
    assert Limit.of(FLOPS, 33, 2400.0, 4000.0, Degrees()) == Limit(0.25, 0.125, 33 / 0.375)
    assert Limit.of(FLOPS, 33, 2400.0, 4000.0, Degrees(ulysses=4, vae=2)) == Limit(0.0625, 0.0625, 33 / 0.125)


def test_a_setting_compares_programs_turn_by_turn():
    slow, fast = made_up([2.0, 6.0, 3.0]), made_up([1.0, 2.0, 1.0])
    values = subject().to_json({"diffusers": slow, "ours": fast})
    assert values["speedups"]["ours over diffusers"]["median"] == statistics.median([2.0, 3.0, 3.0])
    assert values["differences from diffusers"] == {"ours": 0.0}
    cut = subject().to_json({"diffusers": slow, "ours": Measured(error="MemoryError: no")})
    assert cut["programs"]["ours"] == {"first_chunk": None, "error": "MemoryError: no"} and cut["speedups"] == {}


# Turns


class MadeUpVideo:
    def __init__(self, name: str, log: list[str], fails_at: int | None = None) -> None:
        self.name, self.log, self.fails_at, self.made = name, log, fails_at, 0

    def chunk(self):
        if self.made == self.fails_at:
            raise MemoryError("no room")
        self.made += 1
        self.log.append(self.name)
        return ChunkTimes(float(self.made), 0.0, {}), torch.ones(1)

    def alone(self):
        return {"decode": 1.0}

    def close(self):
        self.log.append(f"{self.name} closed")


def test_turns_go_forth_and_back_and_the_warmup_is_dropped():
    log: list[str] = []
    after = []
    videos = {name: lambda name=name: MadeUpVideo(name, log) for name in "ab"}
    measured = take_turns(videos, chunks=2, warmup=1, after_turn=lambda found: after.append(len(found["a"].chunks)))
    assert log == ["a", "b", "b", "a", "a", "b", "b", "a", "a closed", "b closed"]
    assert measured["a"].first.total == 1.0 and [each.total for each in measured["a"].chunks] == [3.0, 4.0]
    assert measured["a"].alone == {"decode": 1.0} and after == [0, 0, 1, 2]


def test_a_program_that_fails_is_left_and_the_others_go_on():
    log: list[str] = []
    videos = {"a": lambda: MadeUpVideo("a", log, fails_at=1), "b": lambda: MadeUpVideo("b", log)}
    measured = take_turns(videos, chunks=2, warmup=0, keeps_going=True)
    assert measured["a"].error == "MemoryError: no room" and measured["a"].first and not measured["a"].chunks
    assert log.index("a closed") < len(log) - 1 - log[::-1].index("b"), "what it holds is given back at once"
    assert len(measured["b"].chunks) == 2
    with pytest.raises(MemoryError):
        take_turns(videos, chunks=2, warmup=0)


# Command line


def test_command_line(tmp_path, capsys):
    output = tmp_path / "fps.json"
    flags = ["--random-weights", "tiny", "--settings", "distilled-111", "--compare", "diffusers", "--chunks", "2"]
    assert fps.main([*flags, "--device", "cpu", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    results = found["results"]
    assert found["machine"]["cores"] and found["versions"]["torch"] == torch.__version__
    assert results["random_weights"] and results["ranks"] == 1 and results["dtype"] == "float32"
    setting = results["settings"]["distilled-111"]
    assert setting["steps"] == [1, 1, 1] and setting["size"] == [64, 64]
    assert setting["differences from diffusers"]["ours"] < 1e-4
    for name, flops in (("diffusers", "diffusers denoise"), ("ours", "denoise")):
        program = setting["programs"][name]
        assert len(program["chunks"]) == 2
        assert program["fps"] == 33 / statistics.median(each["total"] for each in program["chunks"])
        denoise = statistics.median(each["stages"]["denoise"] for each in program["chunks"])
        rate = setting["flops"][flops] / denoise
        assert program["flops_per_second_and_rank"]["denoise"] == pytest.approx(rate)
        gemm = results["gemm_flops_per_second"]["transformer"]
        assert program["percent_of_gemm_rate"]["denoise"] == pytest.approx(100 * rate / gemm)
    printed = capsys.readouterr().out
    assert "of one rank: " in printed and "times as fast" in printed and f"written to {output}" in printed


def test_a_checkpoint_with_its_text_encoder(tmp_path, presets):
    output = tmp_path / "fps.json"
    flags = ["--model", str(presets["random-distilled"]), "--settings", "distilled-111", "--height", "64"]
    assert fps.main([*flags, "--width", "64", "--chunks", "2", "--device", "cpu", "--output", str(output)]) == 0
    results = json.loads(output.read_text())["results"]
    assert not results["random_weights"] and results["text_seconds"] > 0


def measure_on_ranks(rank: int, ranks: int) -> dict:
    """What every rank of a torchrun does once it is connected."""
    flags = ["--random-weights", "tiny-mid", "--chunks", "2", "--warmup", "0", "--device", "cpu", "--cfg-parallel", "2"]
    job = fps.check(fps.build_parser().parse_args(flags), Ranks(rank, rank, ranks, ranks))
    light = replace(job.requests["mid"], pyramid_num_inference_steps_list=(3, 1, 1))
    return fps.run(replace(job, requests={"mid": light}), Mesh.build(job.layout.degrees))


def test_on_several_ranks():
    """Guidance on each half, and the sequence and the VAE over two ranks each."""
    first, *others = shared_pool().run(measure_on_ranks, 4, ranks=4, timeout=240)
    assert first["ranks"] == 4 and first["layout"]["degrees"]["cfg"] == first["layout"]["degrees"]["vae"] == 2
    program = first["settings"]["mid"]["programs"]["ours"]
    assert program["fps"] > 0 and program["alone_seconds"].keys() == {"decode", "transfer"}
    rates, flops = program["flops_per_second_and_rank"], first["settings"]["mid"]["flops"]
    assert rates["denoise"] == pytest.approx(flops["denoise"] / program["stage_seconds"]["denoise"] / 4)
    assert rates["decode"] == pytest.approx(flops["decode"] / program["alone_seconds"]["decode"] / 2)
    for other in others:
        assert "transfer" not in other["settings"]["mid"]["programs"]["ours"]["alone_seconds"], "frames end on rank 0"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--random-weights", "13b"], "--random-weights 13b: allowed are 14b, 14b-mid, 14b-base"),
        (["--random-weights", "tiny", "--settings", "mid"], "--settings mid: this is Helios-Distilled; allowed are"),
        (["--random-weights", "tiny", "--model", "tiny-mid"], "--model tiny-mid --random-weights tiny: give one"),
        (["--random-weights", "tiny", "--chunks", "1"], "--chunks 1: must be 2 or more"),
        (["--random-weights", "tiny", "--warmup", "-1"], "--warmup -1: must be 0 or more"),
        (["--random-weights", "tiny", "--height", "100"], "--height 100"),
        (["--random-weights", "tiny", "--compare", "eager"], "--compare eager: no flag of speed or memory is given"),
        (["--random-weights", "tiny", "--dtype", "int4"], "--dtype int4"),
        (["--random-weights", "tiny", "--device", "gpu"], "--device gpu"),
        (["--random-weights", "tiny", "--ulysses", "2"], "--ulysses 2"),
        (["--random-weights", "tiny", "--cuda-graphs"], "--cuda-graphs: not on cpu"),
        (
            ["--random-weights", "tiny", "--quantize", "int8", "--dtype", "float16"],
            "--quantize int8 with --dtype float16",
        ),
        (["--timeout", "0"], "--timeout 0: a finite number above 0"),
        (["--settings", "all"], "--settings: invalid choice: 'all'"),
        (["--model", "/nowhere"], "--model /nowhere"),
        (["--output", "fps.txt"], "--output fps.txt"),
    ],
)
def test_bad_arguments_are_one_line(flags, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        fps.main(["--device", "cpu", *flags])
    error = capsys.readouterr().err
    assert error.startswith("benchmarks.fps: error: ") and said in error and error.count("\n") == 1


def test_several_ranks_are_not_compared_with_diffusers():
    parser = fps.build_parser()
    arguments = parser.parse_args(["--random-weights", "tiny", "--compare", "diffusers", "--device", "cpu"])
    with pytest.raises(RequestError, match=r"--compare diffusers: on 2 ranks .* benchmarks.scaling"):
        fps.check(arguments, Ranks(0, 0, 2, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_card(tmp_path):
    """GPU: a chunk is decoded beside the next, so that no transfer is told; decoding alone is."""
    pytest.importorskip("rich")
    output = tmp_path / "fps.json"
    flags = ["--random-weights", "small", "--settings", "distilled-111", "--compare", "diffusers", "--chunks", "2"]
    assert fps.main([*flags, "--device", "cuda", "--output", str(output)]) == 0
    programs = json.loads(output.read_text())["results"]["settings"]["distilled-111"]["programs"]
    assert programs["ours"]["alone_seconds"].keys() == {"decode", "transfer"}
    assert programs["ours"]["fps"] > 0 and programs["diffusers"]["stage_seconds"]["transfer"] > 0
