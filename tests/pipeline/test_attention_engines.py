"""Unit and multi-rank gloo: what the attention engines ask of a request, and a forward by each that a CPU can run.

Tolerance of a forward: 1e-5 of the output's range, for sums taken in another order.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from benchmarks.ranks.pool import shared_pool
from helios_cp.config import layout
from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Execution
from helios_cp.config.layout import AskedLayout, segment_lengths, smallest_tokens
from helios_cp.config.request import Request
from helios_cp.model.sequence import TokenSequence
from helios_cp.pipeline.pipeline import Pipeline
from helios_cp.plan.choose import choose_layout
from helios_cp.weights.check import check_execution
from parallel.engines import ENGINES
from parallel.mesh import Degrees, Mesh

CPU = torch.device("cpu")
STEPS = {"random-base": {"num_inference_steps": 1}, "random-distilled": {"pyramid_num_inference_steps_list": (1, 1, 1)}}

needs_yunchang = pytest.mark.skipif(not importlib.util.find_spec("yunchang"), reason="needs the package yunchang")


def test_the_command_line_offers_every_engine():
    assert layout.ENGINES == ENGINES


class Recorder(TokenSequence):
    """Keeps the segment lengths of every forward."""

    def __init__(self):
        self.lengths = []

    def operations(self, lengths):
        self.lengths.append(lengths)
        return super().operations(lengths)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("random-distilled", {"height": 64, "width": 128}),
        ("random-distilled", {"height": 128, "width": 64, "keep_first_frame": False, "history_sizes": (9, 3, 2)}),
        ("random-base", {"height": 48, "width": 80, "use_zero_init": False}),
    ],
)
def test_segment_lengths_are_those_of_the_transformer(presets, name, fields):
    pipeline = Pipeline.from_pretrained(str(presets[name]), dtype=torch.float32)
    pipeline.transformer.sequence = recorder = Recorder()
    request = Request(prompt=("a fox",), num_frames=66, guidance_scale=1.0, **STEPS[name], **fields)
    for _ in pipeline.stream(request, output_type="latent"):
        pass
    resolved = request.resolve(pipeline.checkpoint)
    found = segment_lengths(resolved, pipeline.checkpoint)
    assert list(dict.fromkeys(recorder.lengths)) == found
    assert smallest_tokens(resolved, pipeline.checkpoint) == found[0][-1]


def test_segment_lengths_of_the_default_size(presets):
    checkpoint = Checkpoint.read(presets["random-distilled"])
    request = Request(prompt=("a fox",), height=384, width=640).resolve(checkpoint)
    assert segment_lengths(request, checkpoint) == [(240, 240, 1920, noisy) for noisy in (540, 2160, 8640)]


def choose(presets, sizes, ranks, **flags):
    checkpoint = Checkpoint.read(presets["random-distilled"])
    requests = [Request(prompt=("a fox",), height=h, width=w).resolve(checkpoint) for h, w in sizes]
    layout = choose_layout(AskedLayout(**flags), checkpoint, requests, ranks, torch.float32)
    sequences = [lengths for request in requests for lengths in segment_lengths(request, checkpoint)]
    check_execution(checkpoint, Execution(), CPU, torch.float32, layout, sequences=sequences)
    return layout


@needs_yunchang
def test_yunchang_is_refused_for_sizes_that_do_not_divide(presets):
    """Of all requests: 9 tokens in the smallest stage of 64 × 64, and 18 in that of 64 × 128."""
    assert choose(presets, [(64, 128)], 2, attention="yunchang").attention == "yunchang"
    with pytest.raises(RequestError, match=r"^--attention yunchang: .* 9 tokens do not divide by 2 .*; use native$"):
        choose(presets, [(64, 128), (64, 64)], 2, attention="yunchang")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"attention": "xfuser"}, "--attention xfuser: xfuser attention needs a CUDA device, not cpu; use native"),
        ({"attention": "cudnn"}, "--attention cudnn: cudnn attention needs a CUDA device, not cpu; use native"),
        (
            {"attention": "yunchang", "ring": 2},
            "--attention yunchang: yunchang attention gives wrong results",
        ),
    ],
)
def test_engines_that_cannot_run_here_are_refused(presets, flags, said):
    with pytest.raises(RequestError) as refusal:
        choose(presets, [(64, 128)], 2, **flags)
    assert str(refusal.value).startswith(said)


@torch.no_grad()
def run_forward(rank: int, folder: str, degrees: Degrees, attention: str) -> torch.Tensor:
    """Batch 2, with 4 + 4 + 32 history tokens and 144 noisy ones."""
    from helios_cp.model.conditions import History
    from helios_cp.pipeline.parallelize import load_parallel

    transformer = load_parallel(folder, Mesh.build(degrees), dtype=torch.float32, attention=attention).transformer
    generator = torch.Generator().manual_seed(0)
    short, mid, long = (torch.randn(2, 16, frames, 8, 8, generator=generator) for frames in (2, 2, 16))
    condition = transformer.encode_history(History(short, (0, 19), mid, (17, 18), long, tuple(range(1, 17))))
    text = transformer.encode_text(torch.randn(2, 11, 32, generator=generator))
    latents = torch.randn(2, 16, 9, 8, 8, generator=generator)
    return transformer(latents, torch.tensor([700, 300]), text, condition, tuple(range(20, 29)))


@needs_yunchang
@pytest.mark.parametrize("degrees", [Degrees(ulysses=2), Degrees(ulysses=4, ffn_tp=2)], ids=str)
def test_a_forward_by_yunchang(presets, degrees):
    folder = str(presets["random-distilled"])
    (alone,) = shared_pool().run(run_forward, folder, Degrees(), "native", ranks=1)
    for out in shared_pool().run(run_forward, folder, degrees, "yunchang", ranks=degrees.world):
        assert (out - alone).abs().max() <= 1e-5 * (alone.max() - alone.min())
