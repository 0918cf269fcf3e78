"""Unit: the numbers of SPEC's sampling section, each against diffusers' schedulers or a value worked out by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import HeliosDMDScheduler, HeliosScheduler

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.request import Request
from helios_cp.config.sampling_plan import SamplingPlan
from helios_cp.sampling.denoise import denoise, guide, projection, renoise_coefficients, set_timesteps, shift_mu
from helios_cp.sampling.noise import (
    block_noise,
    block_noise_factor,
    double_nearest,
    halve_noise,
    make_generators,
    normal,
)
from helios_cp.weights.load import load_scheduler

CPU = torch.device("cpu")


def plan_for(folder, **fields) -> tuple[SamplingPlan, Checkpoint]:
    checkpoint = Checkpoint.read(folder)
    request = Request(prompt=("a fox",), **fields).resolve(checkpoint)
    return SamplingPlan.of(request, checkpoint), checkpoint


def test_distilled_timesteps_at_384x640(presets):
    """Two steps a stage; the shift comes from the size before the stage's upsample: 540, 540, 2160 tokens."""
    plan, checkpoint = plan_for(presets["random-distilled"])
    scheduler = load_scheduler(checkpoint)
    expected = [[998.534, 833.964], [742.605, 512.463], [385.147, 174.764]]
    sizes = [(12, 20), (12, 20), (24, 40)]
    for stage, (size, timesteps) in enumerate(zip(sizes, expected, strict=True)):
        set_timesteps(scheduler, plan, stage, torch.empty(1, 16, 9, *size), first_chunk=False)
        np.testing.assert_allclose(scheduler.timesteps, timesteps, atol=5e-4)
        set_timesteps(scheduler, plan, stage, torch.empty(1, 16, 9, *size), first_chunk=True)
        assert len(scheduler.timesteps) == 4, "the first chunk is amplified"


def test_shift_is_linear_in_tokens():
    assert shift_mu(256) == pytest.approx(0.5) and shift_mu(4096) == pytest.approx(1.15)
    assert shift_mu(540) == pytest.approx(540 * 0.65 / 3840 + 0.5 - 256 * 0.65 / 3840)


def test_renoise_coefficients():
    """SPEC's values for γ = 1/3 at stages 2 and 3, and the property that defines them."""
    starts = HeliosDMDScheduler(stages=3).ori_start_sigmas
    for stage, expected in ((1, (0.600120, 0.692612)), (2, (0.749813, 0.433337))):
        assert renoise_coefficients(starts[stage], 1 / 3) == pytest.approx(expected, abs=1e-6)


def test_block_noise_factor():
    """The rows that SPEC gives; the factor squared is the covariance, which is singular but for the 1e-8."""
    factor = block_noise_factor(1 / 3, 4)
    rows = [[1.0], [-0.3333, 0.9428], [-0.3333, -0.4714, 0.8165], [-0.3333, -0.4714, -0.8165, 2e-4]]
    expected = torch.tensor([row + [0.0] * (4 - len(row)) for row in rows], dtype=torch.float64)
    assert (factor - expected * torch.tensor([[1], [1], [1], [1]]))[:, :3].abs().max() < 0.2
    covariance = torch.eye(4, dtype=torch.float64) * 4 / 3 - 1 / 3
    assert (factor @ factor.T - covariance).abs().max() < 2e-8


def test_block_noise_has_its_covariance_and_draws_per_sample():
    generators = make_generators((1, 2))
    noise = block_noise((16, 9, 32, 32), 1 / 3, (1, 2, 2), generators, CPU)
    assert noise.shape == (2, 16, 9, 32, 32)
    blocks = noise.unflatten(-1, (16, 2)).unflatten(-3, (16, 2)).movedim(-3, -2).flatten(-2).flatten(0, -2)
    expected = torch.eye(4) * 4 / 3 - 1 / 3
    # 73,728 blocks: the standard error of an entry is below 0.005.
    assert (torch.cov(blocks.T) - expected).abs().max() < 0.025
    alone = block_noise((16, 9, 32, 32), 1 / 3, (1, 2, 2), make_generators((2,)), CPU)
    assert torch.equal(noise[1:], alone)


def test_resizing_noise():
    noise = normal((4, 3, 8, 12), make_generators((0,)), CPU)
    expected = noise.unflatten(-1, (6, 2)).unflatten(-3, (4, 2)).mean((-1, -3)) * 2
    torch.testing.assert_close(halve_noise(noise), expected)
    assert torch.equal(double_nearest(noise)[..., ::2, ::2], noise)
    assert torch.equal(double_nearest(noise)[..., 1::2, 1::2], noise)


@pytest.fixture
def mid_plan(presets):
    return plan_for(presets["random-mid"], pyramid_num_inference_steps_list=(4, 2, 2))[0]


def test_guidance_formulas(mid_plan):
    c, u = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    plain = dataclasses.replace(mid_plan, is_cfg_zero_star=False, guidance_scale=3.0)
    torch.testing.assert_close(guide(c, u, plain), u + 3 * (c - u))
    assert guide(c, None, plain) is c
    a = projection(c, u)
    torch.testing.assert_close(a[1], ((c[1] * u[1]).sum() / (u[1] ** 2).sum()).view(1, 1, 1, 1))
    star = dataclasses.replace(mid_plan, guidance_scale=3.0)
    torch.testing.assert_close(guide(c, u, star), a * u + 3 * (c - a * u))
    # The projection is what is left over along u: c − a·u has no part in that direction.
    assert ((c - a * u) * u).sum((1, 2, 3, 4)).abs().max() < 1e-4


@pytest.mark.parametrize(("zero_steps", "use_zero_init", "zeroed"), [(1, True, 2), (0, True, 1), (5, False, 0)])
def test_zeroed_steps_need_no_forward(presets, zero_steps, use_zero_init, zeroed):
    steps = (4, 2, 2)
    plan, checkpoint = plan_for(
        presets["random-mid"],
        pyramid_num_inference_steps_list=steps,
        zero_steps=zero_steps,
        use_zero_init=use_zero_init,
    )
    calls = []

    def predict(latents, timestep):
        calls.append((tuple(latents.shape), timestep))
        return latents, latents / 2

    noise = normal((16, 9, 8, 8), make_generators((0,)), CPU)
    events = list(
        denoise(noise, predict, plan, load_scheduler(checkpoint), make_generators((0,)), chunk=0, dtype=noise.dtype)
    )
    assert len(calls) == sum(steps) - zeroed
    assert [event.index for event in events[:-1]] == list(range(1, sum(steps) + 1))
    assert all(event.total == sum(steps) for event in events[:-1])
    assert events[-1].shape == noise.shape
    assert all(not timestep.is_floating_point() for _, timestep in calls), "pyramid timesteps are truncated"
    assert [shape[-1] for shape, _ in calls] == [2] * (4 - zeroed) + [4] * 2 + [8] * 2


def test_base_passes_floating_timesteps(presets):
    plan, checkpoint = plan_for(presets["random-base"], num_inference_steps=3)
    timesteps = []

    def predict(latents, timestep):
        timesteps.append(timestep)
        return latents, None

    noise = normal((16, 9, 8, 8), make_generators((0,)), CPU)
    list(denoise(noise, predict, plan, load_scheduler(checkpoint), [], chunk=0, dtype=noise.dtype))
    assert len(timesteps) == 3 and all(timestep.is_floating_point() for timestep in timesteps)


def test_distilled_ignores_guidance(presets):
    """One forward a step whatever the scale: the negative prompt is never asked for."""
    plan, _ = plan_for(presets["random-distilled"], guidance_scale=7.0)
    assert not plan.is_guided and not plan.is_zeroed(0, 0)


def test_dmd_adds_no_new_noise(presets):
    """With zero velocity x0 = x, so a step only mixes x with the stage's start point, which is x: nothing moves."""
    plan, checkpoint = plan_for(presets["random-distilled"], is_amplify_first_chunk=False)
    scheduler = load_scheduler(checkpoint)
    one_stage = dataclasses.replace(plan, steps=(3,))
    noise = normal((16, 9, 4, 4), make_generators((0,)), CPU)
    generators = make_generators((0,))
    before = generators[0].get_state()

    def predict(latents, timestep):
        return torch.zeros_like(latents), None

    *_, latents = denoise(noise, predict, one_stage, scheduler, generators, chunk=1, dtype=noise.dtype)
    torch.testing.assert_close(latents, noise)
    assert torch.equal(generators[0].get_state(), before)


def test_unipc_scheduler_is_diffusers_own(presets):
    assert isinstance(load_scheduler(Checkpoint.read(presets["random-mid"])), HeliosScheduler)
    assert isinstance(load_scheduler(Checkpoint.read(presets["random-distilled"])), HeliosDMDScheduler)
