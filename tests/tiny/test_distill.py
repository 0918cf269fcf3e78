"""Unit: how Distilled learns: the sampler's steps in training, starts of its own making, distribution matching."""

from __future__ import annotations

import random

import pytest
import torch

from helios_cp.sampling.denoise import set_timesteps
from helios_cp.sampling.solvers import SchedulerSteps
from helios_cp.tiny import initial, matching, own
from helios_cp.tiny.examples import Place, past_of
from helios_cp.tiny.forward import Past, embed_text, velocity
from helios_cp.tiny.latents import CHUNKS
from helios_cp.tiny.pyramid import Stages, halve
from helios_cp.tiny.rollout import FewSteps
from helios_cp.tiny.sample import make_plan, make_scheduler
from helios_cp.tiny.text import Reader, tokenize
from helios_cp.tiny.world import draw_scene


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return Reader().encoder.eval()


@pytest.fixture
def student():
    return made(seed=1)


def made(seed: int):
    """A transformer whose velocity is not 0."""
    torch.manual_seed(seed)
    model = initial.make_transformer()
    with torch.no_grad():
        model.proj_out.weight.normal_(std=0.05)
    return model


class FewClips:
    """Two clips of random latents, in the form of `Clips`."""

    def __init__(self) -> None:
        torch.manual_seed(2)
        generator = random.Random(2)
        self.scenes = [draw_scene(generator) for _ in range(2)]
        self.chunks = torch.randn(2, CHUNKS, 16, 9, 8, 16)
        self.subject = torch.zeros(2, CHUNKS, 1, 9, 8, 16)
        self.stills = torch.randn(2, 16, 1, 8, 16)


def past(count: int) -> Past:
    torch.manual_seed(3)
    return Past(torch.randn(count, 16, 19, 8, 16), torch.randn(count, 16, 1, 8, 16))


def words(model, encoder, count: int):
    ids, mask = tokenize(["a red ball"] * count)
    return embed_text(model, encoder(ids, mask).last_hidden_state, mask)


@torch.no_grad()
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_steps_of_a_stage_are_those_of_the_scheduler(stage, student, encoder):
    """diffusers' own step, in fp64 inside, to rounding."""
    before, text = past(2), words(student, encoder, 2)
    start = torch.randn(2, 16, 9, 2 << stage, 4 << stage)
    plan, scheduler = make_plan("distilled", 1.0), make_scheduler("distilled")
    set_timesteps(scheduler, plan, stage, start if stage == 0 else halve(start), first_chunk=False)
    latents, solve = start, SchedulerSteps(scheduler, start)
    for timestep in scheduler.timesteps.long().float():
        latents = solve(velocity(student, latents, timestep.expand(2), text, before), latents)
    *_, ours = FewSteps(Stages()).guesses(student, stage, start, text, before)
    assert (latents - start).std() > 0.1
    torch.testing.assert_close(ours, latents, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_clean_latents_are_found_again(stage):
    torch.manual_seed(0)
    stages, clean = Stages(), torch.randn(1, 16, 9, 2 << stage, 4 << stage)
    start, end = stages.points_at(clean, stage)
    found = stages.clean_of(stage, start, end, halve(clean) if stage else None)
    torch.testing.assert_close(found, clean, atol=1e-4, rtol=1e-4)


def test_a_stage_ends_in_the_clip_whatever_it_starts_from():
    """Less and less of an error in the start is wanted at a stage's end, and nothing at the last one's."""
    torch.manual_seed(0)
    stages, clean = Stages(), torch.randn(1, 16, 9, 8, 16)
    for stage in (1, 2):
        start, end = stages.points(clean, stage)
        _, mended = stages.points(clean, stage, start + 1)
        expected = stages.end[stage] / stages.start[stage]
        torch.testing.assert_close(mended - end, torch.full_like(end, expected), atol=1e-4, rtol=1e-4)
        assert expected < 1


@pytest.mark.parametrize("kind", own.PASTS)
def test_a_past_of_its_own_ends_in_what_the_student_made(kind, student, encoder, monkeypatch):
    """And what its last frame is off by, the first frame wanted is too; the last one is the clip's."""
    monkeypatch.setattr("helios_cp.tiny.examples.CLEAN_PAST", 1.0)
    monkeypatch.setattr(own, "PASTS", [kind])
    clips, sampler, continued, made = FewClips(), FewSteps(Stages()), [], torch.full((3, 16, 9, 8, 16), 7.0)
    monkeypatch.setattr(sampler, "chunk", lambda model, noise, text, past: continued.append(past) or made)
    drawn = own.draw_continuation(sampler, student, clips, encoder, random.Random(0), 3)
    batch, history, chunks = drawn.batch, drawn.batch.past.history, clips.chunks.flatten(0, 1)
    assert drawn.frames == (1 if kind == "first" else 9)
    if kind == "true":
        assert not continued
        assert all(any(torch.equal(chunk, clean) for chunk in chunks) for clean in batch.clean)
        return
    (before,) = continued
    assert torch.equal(history[:, :, -9:], made)
    assert torch.equal(history[:, :, :10], before.history[:, :, 9:])
    assert torch.equal(batch.past.anchor, made[:, :, :1] if kind == "first" else before.anchor)
    assert before.history.any() == (kind == "continued")
    for wanted in batch.clean:
        ((clip, number),) = (
            (clip, number)
            for clip in range(2)
            for number in range(CHUNKS)
            if torch.equal(clips.chunks[clip, number, :, -1], wanted[:, -1])
        )
        off = 7 - clips.chunks[clip, 1 - number, :, -1]
        torch.testing.assert_close(wanted[:, 0] - clips.chunks[clip, number, :, 0], off)


def regression(generator: random.Random):
    """None, so that what is left is matching."""
    return torch.zeros(()), {}


@pytest.fixture(params=[0, 1])
def stage(request, monkeypatch) -> int:
    monkeypatch.setattr(matching, "MATCHED_STAGES", [request.param])
    return request.param


def matched(pair: matching.Pair, teacher, encoder) -> None:
    """Gradients of a batch."""
    torch.manual_seed(0)
    loss = matching.make_loss(pair, teacher, FewClips(), encoder, regression, scale=0.2)
    total, _ = loss(random.Random(0))
    total.backward()


@pytest.mark.usefixtures("stage")
def test_a_student_that_makes_what_its_teacher_makes_stays(student, encoder, monkeypatch):
    """So a critic that says what the unguided teacher says pulls nowhere, to rounding; and it learns all the same."""
    monkeypatch.setattr(matching, "GUIDANCE", 1.0)
    teacher = made(seed=5)
    pair = matching.Pair(student, made(seed=5))
    matched(pair, teacher, encoder)
    assert all(p.grad is None or p.grad.abs().max() < 1e-5 for p in pair.student.parameters())
    assert pair.critic.proj_out.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.usefixtures("stage")
@pytest.mark.parametrize("shift", [0.5, -0.5])
def test_a_student_that_makes_too_much_of_something_makes_less(shift, student, encoder, monkeypatch):
    """A critic that ends higher than the teacher says that the student does: it comes down, or the reverse."""
    monkeypatch.setattr(matching, "GUIDANCE", 1.0)
    teacher, critic = made(seed=5), made(seed=5)
    with torch.no_grad():
        critic.proj_out.bias -= shift  # an end is the noisy latents less the velocity
    pair = matching.Pair(student, critic)
    matched(pair, teacher, encoder)
    fall = -pair.student.proj_out.bias.grad  # what a step adds to velocities, which ends lack
    assert (fall.sign() == (1 if shift > 0 else -1)).all()


def test_places_before_the_first_chunk_of_a_clip_are_its_last():
    """What `draw_continuation` relies on: clips repeat, so a past of two chunks may begin with the second one."""
    clips, generator = FewClips(), random.Random(0)
    clean = [past_of(clips, [Place("continued", 0, 1, 0, 2)], generator) for _ in range(20)]
    wanted = torch.cat([clips.chunks[0, 1], clips.chunks[0, 0]], 1)
    assert any(torch.equal(each.history[0, :, 1:], wanted) for each in clean)
