"""Unit: what the transformers are trained on, against the engine's sampler.

Statistics of noise are over 10⁵ values and more: bounds of 0.02 are five standard errors or more.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from helios_cp.sampling.denoise import set_timesteps
from helios_cp.sampling.noise import double_nearest
from helios_cp.tiny import distill, flow, initial, judging
from helios_cp.tiny.examples import corrupted
from helios_cp.tiny.forward import Past
from helios_cp.tiny.pyramid import Stages, halve
from helios_cp.tiny.sample import make_plan, make_scheduler


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_timesteps_are_those_of_the_sampler(stage):
    plan, scheduler = make_plan("mid", 2.0, (9, 9, 9)), make_scheduler("mid")
    set_timesteps(scheduler, plan, stage, torch.zeros(1, 16, 9, 4, 8), first_chunk=False)
    ours = Stages().timestep(stage, scheduler.sigmas[:-1])
    assert torch.equal(ours, scheduler.timesteps.long().double())


@pytest.mark.parametrize("stage", [1, 2])
def test_the_noise_of_a_later_stage_is_white(stage):
    """Block noise makes it so: the doubled noise of the stage before alone is the same all over a 2×2 block."""
    torch.manual_seed(0)
    stages, clean = Stages(), torch.zeros(4, 16, 9, 16, 32)
    start, end = stages.points(clean, stage)
    noise = start / stages.start[stage]
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert correlation(noise) == pytest.approx(0, abs=0.02)
    assert correlation(double_nearest(halve(noise))) == pytest.approx(1, abs=1e-4)
    assert end.std() == pytest.approx(stages.end[stage], abs=0.02)


def correlation(noise: torch.Tensor) -> float:
    """Of the left and the right half of blocks."""
    left, right = noise[..., ::2], noise[..., 1::2]
    return float((left * right).mean() / noise.square().mean())


def test_the_last_stage_ends_in_the_clip():
    clean = torch.randn(1, 16, 9, 8, 16)
    torch.testing.assert_close(Stages().points(clean, 2)[1], clean)


def test_errors_on_the_subject_weigh_more():
    subject = torch.zeros(1, 1, 9, 8, 16)
    subject[..., :4, :] = 1
    on, off = torch.zeros(1, 16, 9, 4, 8), torch.zeros(1, 16, 9, 4, 8)
    on[..., :2, :], off[..., 2:, :] = checkered(2, 8), checkered(2, 8)
    assert flow.weighted(on, subject) == pytest.approx(0.8)
    assert flow.weighted(off, subject) == pytest.approx(0.2)
    assert flow.weighted(checkered(4, 8).expand_as(on), subject) == pytest.approx(1)


def checkered(height: int, width: int) -> torch.Tensor:
    """1 and −1 in turn, whose mean over regions is 0."""
    return (torch.arange(height)[:, None] + torch.arange(width)) % 2 * 2.0 - 1


def test_errors_of_whole_regions_weigh_more():
    """White noise counts twice, as its means over regions add as much again; a shift by 1 counts 1 + region²."""
    torch.manual_seed(0)
    nowhere = torch.zeros(1, 1, 1, 1, 1)
    assert flow.weighted(torch.randn(1, 16, 9, 64, 128), nowhere) == pytest.approx(2, abs=0.02)
    for height, region in ((2, 1), (4, 2), (8, 4)):
        shift = torch.ones(1, 16, 9, height, 2 * height)
        assert flow.weighted(shift, nowhere) == pytest.approx(1 + (region**2 if region > 1 else 0))


def test_errors_of_the_first_frame_weigh_more():
    first = torch.zeros(1, 16, 9, 8, 16)
    first[:, :, 0] = 1
    assert flow.weighted(first, torch.zeros(1, 1, 1, 1, 1)) == pytest.approx(17 * 3 / 11)


def test_empty_history_stays_empty():
    torch.manual_seed(0)
    latents = torch.randn(16, 19, 4, 8)
    latents[:, :10] = 0
    generator = random.Random(0)
    noisy = [corrupted(latents, generator) for _ in range(50)]
    assert all(not each[:, :10].any() for each in noisy)
    assert sum(torch.equal(each, latents) for each in noisy) in range(10, 40), "half stay clean"


@torch.no_grad()
def test_a_teacher_that_stands_still_ends_where_it_started():
    model, stages = initial.make_transformer(), Stages()  # its velocity is 0, as it has learned nothing
    text = (torch.zeros(2, 3, 128), torch.zeros(2, 1, 1, 3))
    past = Past(torch.zeros(2, 16, 19, 8, 16), torch.zeros(2, 16, 1, 8, 16))
    points = distill.trajectories(model, [text, text], past, torch.randn(2, 16, 9, 8, 16), stages)
    assert [tuple(start.shape[-2:]) for start, _ in points] == [(2, 4), (4, 8)]
    for start, end in points:
        torch.testing.assert_close(end, start, atol=1e-4, rtol=1e-4)


def test_a_seam_is_seen():
    smooth = np.broadcast_to(np.arange(66, dtype=np.uint8)[:, None, None, None], (66, 8, 8, 3))
    broken = smooth.copy()
    broken[33:] += 7
    assert judging.seam(smooth) == pytest.approx(1)
    assert judging.seam(broken) == pytest.approx(8)
    assert judging.seam(smooth[:33]) is None


def test_a_third_of_the_test_prompts_is_held_out():
    prompts = judging.test_prompts(30)
    assert sum(scene.is_held_out for _, scene in prompts) == 10
    assert all(scene.colour in prompt and scene.direction in prompt for prompt, scene in prompts)
