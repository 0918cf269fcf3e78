"""Unit and multi-rank gloo: the decode benchmark on a small VAE; its GPU test is skipped without a card.

No time is compared with another; limits are checked on given times. Frames are bytes: in fp32 they may differ by one
level of grey, as another order of additions can round a pixel the other way; the benchmark refuses to time others.
"""

from __future__ import annotations

import dataclasses
import json
from unittest import mock

import pytest
import torch

from benchmarks.decode import ranks as decode_ranks
from benchmarks.decode.counts import CardCounter, NormTraffic, count_decodes
from benchmarks.decode.ranks import (
    Case,
    RankTimes,
    bound,
    channels_last,
    names,
    ours,
    rows,
    theirs,
    time_decoders,
)
from benchmarks.measuring.timing import Timing
from benchmarks.ranks.pool import RankError, shared_pool
from benchmarks.report.data import read_results
from benchmarks.report.sections import decode_section
from helios_cp.model import codec
from helios_cp.model.codec import to_frames
from helios_cp.model.vae.config import VaeConfig
from helios_cp.model.vae.kernels import Sum
from helios_cp.plan.vae_cost import decode_flops, decode_traffic

decode = pytest.importorskip("benchmarks.decode.__main__")  # which prints with rich

TINY = Case(VaeConfig(8, 16, (1, 1, 1, 1), 0), (32, 24), ("fp32",), (2,), latent_frames=2, in_a_row=1)


def test_limits():
    """One rank decodes in 10 s, two in 6 s; convolutions of half the chunk's FLOPs take 1 s, or two at once 2 s, and
    products of as many FLOPs longer."""
    seconds = {theirs("fp32"): 12.0, channels_last("fp32"): 10.0, ours("fp32"): 5.0, ours("fp32", 2): 6.0}
    seconds |= {bound("convolution", "fp32", 1): 1.0, bound("convolution", "fp32", 2): 2.0}
    seconds |= {bound("product", "fp32", 1): 1.5, bound("product", "fp32", 2): 2.5}
    timings = {name: Timing((value, value)) for name, value in seconds.items()}
    levels = dict.fromkeys(seconds, 0)
    traffic = dict.fromkeys(seconds, (0, 0)) | {ours("fp32", 2): (7, 50)}
    found = rows(
        TINY, [RankTimes(timings, traffic, levels, levels, dict.fromkeys(decode_ranks.BOUNDS, TINY.flops // 2))] * 2
    )
    names = ["diffusers, fp32", "diffusers, fp32, channels last", "ours, fp32, 1 rank", "ours, fp32, 2 ranks"]
    assert [row.name for row in found] == names
    assert [row.fps for row in found] == [5 / 12, 5 / 10, 5 / 5, 5 / 6]
    assert [row.limit for row in found] == pytest.approx([5 / 2] * 4)
    assert [row.speedup for row in found] == [1.0, 1.2, 2.4, 2.0]
    assert [row.speedup_over_channels_last for row in found] == pytest.approx([10 / 12, 1.0, 2.0, 10 / 6])
    assert (found[3].calls, found[3].sent_bytes) == (7, 50.0)


def test_flops_are_the_planners():
    assert TINY.flops == decode_flops(TINY.vae, 2, 4, 3) and TINY.frames == 5
    assert round(decode_ranks.ON_GPU.flops / 1e12, 1) == 66.1 and decode_ranks.ON_GPU.frames == 33


def test_a_chunk_at_full_size():
    """A seventh of diffusers' elementwise bytes on a card and an eighth on a CPU, in no more memory."""
    counts = count_decodes()
    upsampling = 2 * (384 * 192 * (17 * 96 * 160 + 33 * 192 * 320) + 192 * 96 * 33 * 384 * 640)
    for device, times in (("a card", 7), ("a CPU", 8)):
        theirs, ours = (counts[f"{whose}, on {device}"] for whose in ("diffusers", "ours"))
        assert ours["elementwise_bytes"] <= theirs["elementwise_bytes"] / times
        assert ours["least_memory"] <= theirs["least_memory"] < ours["memory"]
        assert ours["flops"] == theirs["flops"] - (9 - 4) * upsampling


def test_what_a_card_moves():
    """A bias is a pass of its own, unless a norm adds it, which writes a sum only where it is kept."""
    states, out = (torch.empty(1, 3, 8, 8, 3, device="meta") for _ in range(2))
    layer = torch.nn.Conv3d(3, 3, 1, device="meta")
    with torch.inference_mode(), CardCounter() as counter:
        layer(states)
        Sum(states, out, layer.bias).total()
    assert counter.total.elementwise_bytes == 2 * states.nbytes + layer.bias.nbytes + 3 * states.nbytes
    norms = NormTraffic()
    for keep in (False, True):
        norms(states, layer.bias, out, states, layer.bias, keep)
    assert norms.bytes == 2 * (2 * states.nbytes + layer.bias.nbytes)
    assert norms.sums == 3 * states.nbytes + 2 * layer.bias.nbytes


@pytest.mark.parametrize("allowed", [False, True])
def test_a_precision_holds_for_products_and_convolutions(allowed):
    """Convolutions, of which a VAE is made, run on TF32 tensor cores unless PyTorch is told otherwise."""
    backends = torch.backends

    def settings() -> tuple[bool, bool]:
        return backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32

    before = settings()
    assert decode_ranks._with_tf32(settings, allowed)() == (allowed, allowed)
    assert settings() == before


def _time_wrongly(rank):
    def dark(video, **options):
        return to_frames(video, **options) // 2

    with mock.patch.object(codec, "to_frames", dark):
        return time_decoders(rank, TINY, 2)


def test_wrong_frames_are_not_timed():
    with pytest.raises(RankError, match=r"frames differ from diffusers' by \{'ours, fp32, 1 rank'"):
        shared_pool().run(_time_wrongly, ranks=2)


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode, "ON_CPU", TINY)
    output = tmp_path / "decode.json"
    flags = ["--repeats", "2", "--ranks", "2", "--precisions", "fp32", "bf16", "--output", str(output)]
    assert decode.main(flags, shared_pool()) == 0
    results = json.loads(output.read_text())["results"]
    programs = results["programs"]
    assert list(programs) == [
        name for precision in ("fp32", "bf16") for name in (*names(TINY, precision), ours(precision, 2))
    ]
    split = programs["ours, fp32, 2 ranks"]
    agreeing = 1  # on how many latent frames go through together
    assert split["collectives"] == decode_traffic(TINY.vae, 2, 2, 3, 2)[0] + agreeing and split["sent_bytes"] > 0
    assert programs["ours, fp32, 1 rank"]["levels_from_diffusers"] <= 1
    assert programs["ours, bf16, 1 rank"]["levels_from_diffusers_fp32"] >= 0
    assert "ours, bf16, 2 ranks" in capsys.readouterr().out
    found, problems = read_results(tmp_path)
    assert not problems and "| ours, fp32, 2 ranks |" in decode_section(found["decode"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path):
    """fp32, TF32 and bf16, on one rank and on two, which share the card over gloo where there is only one."""
    output = tmp_path / "decode.json"
    case = dataclasses.replace(TINY, device_type="cuda", precisions=("fp32", "tf32", "bf16"))
    with mock.patch.object(decode, "ON_GPU", case):
        assert decode.main(["--device", "cuda", "--repeats", "2", "--ranks", "2", "--output", str(output)]) == 0
    assert len(json.loads(output.read_text())["results"]["programs"]) == 3 * 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeats", "1"], "--repeats 1: must be 2 or more"),
        (["--height", "20"], "--height 20: allowed are multiples of 8"),
        (["--height", "16", "--ranks", "3"], "--ranks 3: allowed is 2 to 2, as the latents have 2 rows"),
        (["--precisions", "tf32"], "--precisions tf32: runs on CUDA only"),
        (["--precisions", "fp8"], "--precisions: invalid choice: 'fp8'"),
        (["--output", "out.txt"], "--output out.txt"),
    ],
)
def test_bad_arguments_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        decode.main(flags)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
