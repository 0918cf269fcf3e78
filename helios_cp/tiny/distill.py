"""Distilled: few steps without guidance, by regression on the trajectories of Mid with guidance.

This is the first part of Helios' third training stage (`_ode_regression_loss`): at a step of the few-step sampler the
student learns to say where the teacher's trajectory of that pyramid stage ends. The second step starts from the
student's own first guess, because that is what it will see.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from helios_cp.files.whole_files import write_tensors
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.sampling.denoise import guide, set_timesteps
from helios_cp.sampling.solvers import make_solver
from helios_cp.tiny.captions import caption
from helios_cp.tiny.examples import KINDS, draw_batch, draw_places, past_of
from helios_cp.tiny.flow import BATCH, Loss, weighted
from helios_cp.tiny.forward import Past, embed_text, velocity
from helios_cp.tiny.latents import Clips
from helios_cp.tiny.own import draw_continuation
from helios_cp.tiny.pyramid import Stages, halve
from helios_cp.tiny.rollout import FewSteps, Text
from helios_cp.tiny.sample import encode, make_plan, make_scheduler

TAUGHT_STAGES = 2
"""Stages that the teacher teaches: they decide what is where, which only noise determines. The last stage refines, and
learns that from clips, at a fraction of the cost."""
GUIDANCE = 2.0
STEPS = (8, 5, 1)
"""The teacher's steps in each stage; the last is not run."""
STAGE_SHARES = (0.25, 0.30, 0.45)
FROM_CLIPS = 0.6
"""The share of batches of a taught stage that learn from clips with a history, which says nearly all by itself."""
OWN = 0.6
"""The share of batches from clips that start where the student's own earlier stages end, most of them after a chunk
that it made itself. Such starts are off in light and colour of whole regions, which the student learns to mend."""
TAUGHT_KINDS = {"text": 0.7, "image": 0.1, "continued": 0.15, "switched": 0.05}
SHARD = 24


@torch.no_grad()
def trajectories(
    teacher: HeliosTransformer, texts: list[tuple[Tensor, Tensor]], past: Past, noise: Tensor, stages: Stages
) -> list[tuple[Tensor, Tensor]]:
    """Where each taught stage starts and ends for `noise` `[B, C, T, h, w]`; `texts` are the prompts' and the empty."""
    plan, scheduler = make_plan("mid", GUIDANCE, STEPS), make_scheduler("mid")
    latents, points = halve(halve(noise) * 2) * 2, []
    for stage in range(TAUGHT_STAGES):
        set_timesteps(scheduler, plan, stage, latents, first_chunk=False)
        if stage:
            latents = stages.enter(stage, latents)
        start, solve = latents, make_solver(scheduler, latents)
        for step, timestep in enumerate(scheduler.timesteps.long()):
            if plan.is_zeroed(stage, step):
                guided = torch.zeros_like(latents)
            else:
                times = timestep.float().to(latents.device).expand(len(latents))
                guided = guide(*(velocity(teacher, latents, times, text, past) for text in texts), plan)
            latents = solve(guided, latents)
        points.append((start, latents))
    return points


@torch.no_grad()
def write_trajectories(
    teacher: HeliosTransformer, text_encoder, clips: Clips, folder: Path, count: int, *, seed: int
) -> None:
    """Write shards until the folder holds `count` trajectories. What is there stays."""
    stages, device = Stages(), next(teacher.parameters()).device
    for index in range(-(-count // SHARD)):
        path = folder / f"trajectories-{index:04}.safetensors"
        if path.exists():
            continue
        generator = random.Random(f"{seed} {index}")
        torch.manual_seed(generator.getrandbits(63))
        places = draw_places(clips, generator, SHARD, TAUGHT_KINDS)
        captions = [caption(clips.scenes[place.clip], generator)[0] for place in places]
        past = past_of(clips, places, generator).to(device)
        noise = torch.randn(SHARD, *clips.chunks.shape[2:], device=device)
        with torch.autocast(device.type, torch.bfloat16):
            texts = [encode(teacher, text_encoder, each) for each in (captions, [""] * SHARD)]
            points = trajectories(teacher, texts, past, noise, stages)
        tensors = {"history": past.history, "anchor": past.anchor}
        for stage, (start, end) in enumerate(points):
            tensors |= {f"start.{stage}": start, f"end.{stage}": end}
        halves = {name: value.half().cpu().contiguous() for name, value in tensors.items()}
        write_tensors(path, halves, {"captions": json.dumps(captions)})
        print(f"{path}: {(index + 1) * SHARD} trajectories", flush=True)


@dataclass(frozen=True)
class Trajectories:
    """All trajectories of a folder; `tensors` are those that `write_trajectories` names, joined."""

    tensors: dict[str, Tensor]
    captions: list[str]

    @classmethod
    def read(cls, folder: Path) -> Trajectories:
        parts, captions = [], []
        for path in sorted(folder.glob("trajectories-*.safetensors")):
            with safe_open(path, "pt") as file:
                parts.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                captions += json.loads(file.metadata()["captions"])
        return cls({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, captions)

    def draw(self, stage: int, count: int, generator: random.Random) -> tuple[Tensor, Tensor, Past, list[str]]:
        """Starts, ends, pasts and captions of some."""
        chosen = [generator.randrange(len(self.captions)) for _ in range(count)]
        start, end, history, anchor = (
            self.tensors[name][chosen].float() for name in (f"start.{stage}", f"end.{stage}", "history", "anchor")
        )
        return start, end, Past(history, anchor), [self.captions[i] for i in chosen]


def make_loss(student: HeliosTransformer, clips: Clips, pairs: Trajectories, text_encoder, scale: float = 1.0) -> Loss:
    """The loss of a batch: errors of both steps of a stage, the first counting half."""
    sampler = FewSteps(Stages())
    device = next(student.parameters()).device

    def draw(stage: int, count: int, generator: random.Random) -> tuple[str, Tensor, Tensor, Text, Past, Tensor]:
        """What a batch is of, starts and ends, the text, the past, and where the subject is."""
        if stage < TAUGHT_STAGES and generator.random() >= FROM_CLIPS:
            start, end, past, captions = pairs.draw(stage, count, generator)
            text, nowhere = encode(student, text_encoder, captions), torch.zeros(1, 1, 1, 1, 1, device=device)
            return "taught", start.to(device), end.to(device), text, past.to(device), nowhere
        if generator.random() < OWN:
            drawn = draw_continuation(sampler, student, clips, text_encoder, generator, count)
            batch, text = drawn.batch, embed_text(student, drawn.batch.states, drawn.batch.mask)
            start, _ = sampler.start(student, stage, torch.randn_like(batch.clean), text, batch.past)
            start, end = sampler.stages.points(batch.clean, stage, start)
            return "own" if drawn.frames > 1 else "next", start, end, text, batch.past, batch.subject
        kinds = KINDS if stage >= TAUGHT_STAGES else {key: KINDS[key] for key in ("continued", "switched")}
        batch = draw_batch(clips, text_encoder, generator, count, kinds=kinds)
        text = embed_text(student, batch.states, batch.mask)
        return "clips", *sampler.stages.points(batch.clean, stage), text, batch.past, batch.subject

    def loss(generator: random.Random) -> tuple[Tensor, dict[str, float]]:
        stage = generator.choices((0, 1, 2), STAGE_SHARES)[0]
        count = max(1, round(BATCH["mid"][stage] * scale))
        with torch.autocast(device.type, torch.bfloat16):
            kind, start, end, text, past, subject = draw(stage, count, generator)
            total, figures = torch.zeros((), device=device), {}
            size = (start - end).square().mean()
            kept = 1 if kind == "next" else None
            for step, guess in enumerate(sampler.guesses(student, stage, start, text, past)):
                error = weighted((guess - end)[:, :, :kept], subject[:, :, :kept]).mean() / size
                total = total + error * (1.0 if step else 0.5)
                figures[f"{stage}{kind}{step}"] = error.item()
        return total, figures

    return loss
