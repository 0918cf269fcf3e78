"""Multi-rank gloo: whole layouts against one rank, on the tiny models of Base, Mid and Distilled.

Tolerances, of the output's range: one forward 1e-5, a whole video 1e-4 in latents, one grey level in frames. Ranks
compute the same sums in another order, which costs units in the last place; sampling carries them through its steps.
What is wrong by a token, head or row is wrong by more than 1e-2, as `test_a_broken_merge_shows`.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

from helios_cp.config.execution import Execution
from helios_cp.config.request import Request
from helios_cp.generate.prompt_files import read_schedule_file
from helios_cp.model.conditions import History
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.pipeline.parallelize import load_parallel
from helios_cp.pipeline.pipeline import Pipeline
from helios_cp.pipeline.start import Inputs
from parallel.collectives import Meter
from parallel.mesh import Degrees, Mesh

LAYOUTS = [
    Degrees(ulysses=2),
    Degrees(ring=2),
    Degrees(ulysses=2, ffn_tp=2, vae=2),
    Degrees(ulysses=3, vae=3),
    Degrees(ring=3, ffn_tp=3),
    Degrees(ring=2, ulysses=2, vae=4),
    Degrees(ulysses=4, ffn_tp=2, vae=2),
    Degrees(ring=5, vae=5),
    Degrees(ring=2, ulysses=3, ffn_tp=6, vae=3),
    Degrees(ring=7, ffn_tp=7),
    Degrees(ring=2, ulysses=4, ffn_tp=4, vae=8),
    Degrees(ring=8),
    Degrees(ring=4, ulysses=2, vae=2),
]
GUIDED_LAYOUTS = {
    Degrees(cfg=2): ["random-base", "random-mid"],
    Degrees(cfg=2, ulysses=2, ffn_tp=2, vae=2): ["random-base"],
    Degrees(cfg=2, ring=3): ["random-mid"],
    Degrees(cfg=2, ring=2, ulysses=2, vae=4): ["random-mid"],
}
"""With the checkpoints to try: both where ranks do nothing but share the branches."""
STEPS = {
    "random-base": {"num_inference_steps": 2, "guidance_scale": 3.0},
    "random-mid": {"pyramid_num_inference_steps_list": (3, 1, 1), "guidance_scale": 3.0},
    "random-distilled": {"pyramid_num_inference_steps_list": (1, 1, 1)},
}


def build(folder: str, degrees: Degrees, dtype: torch.dtype = torch.float32):
    return load_parallel(folder, Mesh.build(degrees), dtype=dtype)


Video = tuple[torch.Tensor, torch.Tensor | None]
"""Latents, and frames where there are any."""


@torch.no_grad()
def make_video(pipeline: Pipeline, image: Image.Image | None) -> Video:
    """Two chunks of a batch of two; of a picture, and its seam matched, where there is one."""
    inputs = Inputs(image=image)
    steps = STEPS[f"random-{pipeline.checkpoint.variant}"]
    size = {"height": 64, "width": 64, "num_frames": 66}
    request = Request(prompt=("a fox", "an owl"), match_seams=image is not None, **size, **steps)
    chunks = list(pipeline.stream(request, inputs))
    frames = None if chunks[0].frames is None else torch.cat([chunk.frames for chunk in chunks], 1)
    return torch.cat([chunk.latents for chunk in chunks], 2), frames


def try_layout(rank: int, folder: str, degrees: Degrees, image: Image.Image | None) -> tuple[list[torch.Tensor], Video]:
    """Forwards and a video, on a pipeline that is loaded once."""
    pipeline = build(folder, degrees)
    return run_forwards(pipeline.transformer), make_video(pipeline, image)


def make_both_videos(rank: int, folder: str, image: Image.Image) -> tuple[list[torch.Tensor], list[Video]]:
    """As `try_layout` on one rank, without a picture and with one."""
    pipeline = build(folder, Degrees())
    return run_forwards(pipeline.transformer), [make_video(pipeline, None), make_video(pipeline, image)]


@torch.no_grad()
def follow_schedule(rank: int, folder: str, degrees: Degrees, file: Path) -> torch.Tensor:
    """Latents of a video by its schedule file."""
    request = Request(**read_schedule_file(file))
    return torch.cat([chunk.latents for chunk in build(folder, degrees).stream(request, output_type="latent")], 2)


def run_broken_forwards(rank: int, folder: str, degrees: Degrees) -> list[torch.Tensor]:
    """Partial outputs averaged in place of weighted; only meanwhile, as other files' tests run in these ranks too."""

    def average(out_a, lse_a, out_b, lse_b):
        return (out_a + out_b) / 2, torch.logaddexp(lse_a, lse_b)

    with mock.patch("parallel.ring.merge", average):
        return run_forwards(build(folder, degrees).transformer)


@torch.no_grad()
def run_forwards(transformer: HeliosTransformer) -> list[torch.Tensor]:
    """One forward at each of several sizes, with batch 2 and every history part."""
    generator = torch.Generator().manual_seed(0)
    outputs = []
    for size, history_size in (((2, 2), (8, 8)), ((6, 10), (6, 10)), ((8, 8), (10, 14))):
        latents = torch.randn(2, 16, 9, *size, generator=generator)
        short, mid, long = (torch.randn(2, 16, frames, *history_size, generator=generator) for frames in (2, 2, 16))
        text = transformer.encode_text(torch.randn(2, 11, 32, generator=generator))
        history = History(short, (0, 19), mid, (17, 18), long, tuple(range(1, 17)))
        condition = transformer.encode_history(history)
        timestep = torch.tensor([700, 300])
        outputs.append(transformer(latents, timestep, text, condition, tuple(range(20, 29))))
        outputs.append(transformer(latents, timestep, text))
    return outputs


@dataclass(frozen=True)
class Alone:
    """What one rank makes of a checkpoint."""

    forwards: list[torch.Tensor]
    from_text: Video
    from_picture: Video


@pytest.fixture(scope="module")
def alone(pool, folders, astronaut) -> dict[str, Alone]:
    """By checkpoint; and that plain loading gives the same bits."""
    found = {}
    for name in STEPS:
        ((forwards, videos),) = pool.run(make_both_videos, folders[name], astronaut, ranks=1)
        found[name] = Alone(forwards, *videos)
    latents, _ = make_video(Pipeline.from_pretrained(folders["random-mid"], dtype=torch.float32), None)
    assert torch.equal(latents, found["random-mid"].from_text[0])
    return found


def largest_error(results, references) -> float:
    return max(
        ((mine - other).abs().max() / (other.max() - other.min())).item()
        for mine, other in zip(results, references, strict=True)
    )


@pytest.mark.parametrize(
    ("degrees", "name"),
    [*zip(LAYOUTS, itertools.cycle(STEPS)), *((d, name) for d, names in GUIDED_LAYOUTS.items() for name in names)],
    ids=str,
)
def test_layouts(pool, folders, alone, astronaut, degrees, name):
    """Each checkpoint in every third layout, as how a video is sampled does not depend on the layout of its forwards.

    The ranks that split the decoder encode a picture too, so these layouts start from one and the others from text.
    """
    image, reference = (astronaut, alone[name].from_picture) if degrees.vae > 1 else (None, alone[name].from_text)
    results = pool.run(try_layout, folders[name], degrees, image, ranks=degrees.world, timeout=240)
    for rank, (forwards, (latents, frames)) in enumerate(results):
        assert largest_error(forwards, alone[name].forwards) <= 1e-5
        assert largest_error([latents], reference[:1]) <= 1e-4
        if rank == 0:
            assert (frames.int() - reference[1].int()).abs().max() <= 1
        else:
            assert frames is None, "frames end on rank 0 only"


def test_prompts_that_change_in_transitions(pool, folders, tmp_path):
    """What a live session leaves, made again by two ranks: a change in the middle of the transition before it."""
    size = {"height": 64, "width": 64, "seed": [7], "pyramid_num_inference_steps_list": [1, 1, 1]}

    def made(ranks: int, *transitions: int) -> list[torch.Tensor]:
        entries = [("a fox", 1, None), ("an owl", 1, transitions[0]), ("a cat", 2, transitions[1])]
        schedule = [dict(zip(("prompt", "chunks", "transition"), entry, strict=True)) for entry in entries]
        (tmp_path / "schedule.json").write_text(json.dumps({"prompt_schedule": schedule, **size}))
        arguments = folders["random-distilled"], Degrees(ulysses=ranks), tmp_path / "schedule.json"
        return pool.run(follow_schedule, *arguments, ranks=ranks)

    alone = made(1, 3, 2)
    assert alone[0].shape[2] == 4 * 9
    assert largest_error(made(2, 3, 2), alone * 2) <= 1e-4
    assert largest_error(made(1, 3, 1), alone) > 1e-3, "transitions matter"


def test_a_broken_merge_shows(pool, folders, alone):
    """Partial outputs averaged in place of weighted by their log-sum-exp."""
    outputs = pool.run(run_broken_forwards, folders["random-mid"], Degrees(ring=2), ranks=2)[0]
    assert largest_error(outputs, alone["random-mid"].forwards) > 1e-3


@torch.no_grad()
def make_video_on_card(rank: int, folder: str, degrees: Degrees, dtype: torch.dtype, image) -> torch.Tensor:
    execution = Execution(tf32=False)
    pipeline = load_parallel(folder, Mesh.build(degrees), dtype=dtype, device="cuda:0", execution=execution)
    request = Request(prompt=("a fox",), height=64, width=64, num_frames=66, **STEPS["random-mid"])
    return torch.cat([chunk.latents.cpu() for chunk in pipeline.stream(request, Inputs(image=image))], 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("degrees", [*LAYOUTS[:8], *GUIDED_LAYOUTS], ids=str)
def test_whole_videos_with_ranks_that_share_one_card(pool, folders, alone, astronaut, degrees):
    """GPU: gloo stages through pinned memory. fp32 as on the CPU; bf16 rounds to 8 bits at every layer and step."""
    folder, reference = folders["random-mid"], alone["random-mid"].from_picture[0][:1]
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.1)):
        results = pool.run(make_video_on_card, folder, degrees, dtype, astronaut, ranks=degrees.world, timeout=240)
        for latents in results:
            assert largest_error([latents], [reference]) <= tolerance


def count_collectives(rank: int, folder: str, degrees: Degrees) -> dict:
    meter = Meter()
    transformer = load_parallel(folder, Mesh.build(degrees, meter=meter), dtype=torch.float32).transformer
    with torch.no_grad():
        text = transformer.encode_text(torch.zeros(1, 11, 32))
        history = transformer.encode_history(History(torch.zeros(1, 16, 2, 8, 8), (0, 19)))
        before = meter.total_calls
        transformer(torch.zeros(1, 16, 9, 8, 8), torch.tensor([500]), text, history, tuple(range(20, 29)))
    return {"conditions": before, **meter.calls}


def test_collectives_per_forward(pool, folders):
    """Three blocks: two all-to-alls each and one gather; none for the conditions, none at all on one rank."""
    folder = folders["random-distilled"]
    assert pool.run(count_collectives, folder, Degrees(), ranks=1) == [{"conditions": 0}]
    for calls in pool.run(count_collectives, folder, Degrees(ulysses=2), ranks=2):
        assert calls == {"conditions": 0, "all_to_all": 6, "all_gather": 1}
    for calls in pool.run(count_collectives, folder, Degrees(ring=3), ranks=3):
        assert calls == {"conditions": 0, "ring": 6, "all_gather": 1}


def feed_forward_bytes(rank: int, folder: str, degrees: Degrees) -> int:
    transformer = build(folder, degrees).transformer
    return sum(p.numel() for block in transformer.blocks for p in block.ffn.parameters())


def test_each_rank_loads_its_slice_of_the_feed_forward(pool, folders):
    """192 hidden features over 5 ranks: 39, 39, 38, 38, 38, with the whole bias of the second layer on each."""
    counts = pool.run(feed_forward_bytes, folders["random-distilled"], Degrees(ring=5, ffn_tp=5), ranks=5)
    assert counts == [3 * (size * (96 + 1 + 96) + 96) for size in (39, 39, 38, 38, 38)]
