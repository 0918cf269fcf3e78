"""Unit: a step of the sampler equals diffusers' own, bit for bit on a CPU, and never has the host wait for the device.

The device is PyTorch's meta device, where nothing can be read back: an `.item()` or a `.tolist()` there raises. Copies
from and to the host are seen by a dispatch mode (`tests/crossings.py`); they count like reads.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.request import Request
from helios_cp.config.sampling_plan import SamplingPlan
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.sampling import denoise as sampling
from helios_cp.sampling.denoise import Step, denoise, set_timesteps
from helios_cp.sampling.noise import make_generators
from helios_cp.sampling.solvers import DmdSolver, SchedulerSteps, UniPcSolver, make_solver
from helios_cp.sampling.state import ChunkState, split_history
from helios_cp.weights.load import load_scheduler
from tests.pipeline.crossings import META, Crossings

STEPS = {
    "random-base": {"num_inference_steps": 5},
    "random-mid": {"pyramid_num_inference_steps_list": (4, 3, 2)},
    "random-distilled": {"pyramid_num_inference_steps_list": (2, 2, 2)},
}


def solve(solver, dtype: torch.dtype, steps: int) -> list[Tensor]:
    """The latents after each step, under velocities from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    latents, found = torch.randn(2, 3, 2, 4, 4, generator=generator), []
    for _ in range(steps):
        latents = solver(torch.randn(latents.shape, generator=generator).to(dtype), latents)
        found.append(latents)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("preset", "changes", "solver"),
    [
        ("random-distilled", {}, DmdSolver),
        ("random-base", {}, UniPcSolver),
        ("random-mid", {}, UniPcSolver),
        ("random-mid", {"solver_order": 1}, SchedulerSteps),
        ("random-mid", {"solver_type": "bh1", "disable_corrector": [1]}, SchedulerSteps),
        ("random-mid", {"scheduler_type": "euler"}, SchedulerSteps),
        ("random-mid", {"prediction_type": "v_prediction"}, SchedulerSteps),
    ],
)
def test_a_step_is_diffusers_own(presets, preset, changes, solver, dtype):
    """All stages; a stage that is too short for its order; what is left to diffusers; fp32 and bf16 velocities."""
    checkpoint = Checkpoint.read(presets[preset])
    scheduler = load_scheduler(checkpoint)
    scheduler = type(scheduler).from_config({**scheduler.config, **changes})
    plan = SamplingPlan.of(Request(prompt=("a fox",), **STEPS[preset]).resolve(checkpoint), checkpoint)
    start = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for stage, size in itertools.product(range(len(plan.steps)), (24, 40)):

        def prepared(make, stage=stage, size=size):
            set_timesteps(scheduler, plan, stage, torch.empty(1, 16, 9, size, size), first_chunk=False)
            return make(scheduler, start)

        assert type(prepared(make_solver)) is solver
        ours, theirs = (solve(prepared(make), dtype, plan.steps[stage]) for make in (make_solver, SchedulerSteps))
        for got, wanted in zip(ours, theirs, strict=True):
            assert got.dtype == wanted.dtype and torch.equal(got, wanted)


def test_a_wrong_coefficient_shows(presets, monkeypatch):
    monkeypatch.setattr(UniPcSolver, "_weights", lambda *_: torch.tensor([0.5, 0.5], dtype=torch.float64))
    with pytest.raises(AssertionError):
        test_a_step_is_diffusers_own(presets, "random-mid", {}, UniPcSolver, torch.float32)


def events_on_meta(folder, crossings: Crossings, monkeypatch, make=make_solver):
    """Denoise one chunk on the meta device with the whole transformer; `crossings` has those since a stage began.

    What is made once a size, in its first forward, does not count: a second one does.
    """
    checkpoint = Checkpoint.read(folder)
    request = Request(prompt=("a fox",), height=64, width=64, **STEPS[folder.name.rpartition("-")[0]])
    request = request.resolve(checkpoint)
    plan = SamplingPlan.of(request, checkpoint)
    with META:
        transformer = HeliosTransformer(checkpoint.transformer).eval()
        history = torch.zeros(1, 16, sum(request.history_frames), 8, 8)
    state = ChunkState(1, history, history[:, :, :1], torch.zeros(1))
    pieces, indices = split_history(state, request)
    condition = transformer.encode_history(pieces)
    text = transformer.encode_text(torch.zeros(1, 8, checkpoint.transformer.text_dim, device=META))

    def start_stage(device: torch.device, scheduler, start: Tensor):
        crossings.found.clear()
        return make(scheduler, start)

    def predict(latents: Tensor, timestep: Tensor):
        assert timestep.device == latents.device == META
        before = len(crossings.found)
        transformer(latents, timestep, text, condition, indices)
        del crossings.found[before:]
        found = transformer(latents, timestep, text, condition, indices)
        return found, found if plan.is_guided else None

    monkeypatch.setattr(sampling, "solver_on", start_stage)
    noise = torch.empty(1, 16, 9, 8, 8, device=META)
    scheduler = load_scheduler(checkpoint)
    return denoise(noise, predict, plan, scheduler, make_generators((0,)), chunk=1, dtype=torch.float32)


@pytest.mark.parametrize("preset", STEPS)
def test_a_step_makes_the_host_wait_for_nothing(presets, preset, monkeypatch):
    """All steps of a stage: forwards, guidance and solver."""
    (expected,) = STEPS[preset].values()
    with Crossings() as crossings:
        steps = 0
        for event in events_on_meta(presets[preset], crossings, monkeypatch):
            if isinstance(event, Step):
                assert crossings.found == []
                steps += 1
    assert steps == (expected if isinstance(expected, int) else sum(expected))


@pytest.mark.parametrize("preset", STEPS)
def test_waits_are_seen(presets, preset, monkeypatch):
    """diffusers' own steps, with the schedule on the device: reading there raises, or a copy is counted."""

    def theirs(scheduler, start: Tensor) -> SchedulerSteps:
        scheduler.timesteps, scheduler.sigmas = scheduler.timesteps.to(META), scheduler.sigmas.to(META)
        crossings.found.clear()
        return SchedulerSteps(scheduler, start)

    with Crossings() as crossings:
        try:
            found = [list(crossings.found) for _ in events_on_meta(presets[preset], crossings, monkeypatch, theirs)]
        except (RuntimeError, NotImplementedError) as error:
            assert "meta" in str(error).lower()
        else:
            assert any(found)


def test_dmd_looks_up_truncated_timesteps():
    """Two timesteps in one unit truncate to the same, and so to the same σ, as in diffusers."""
    timesteps = torch.tensor([500.9, 500.2], dtype=torch.float64)
    solver = DmdSolver(torch.tensor([0.5, 0.25, 0.0], dtype=torch.float64), timesteps, torch.zeros(1))
    assert solver.sigmas == [0.25, 0.25]
