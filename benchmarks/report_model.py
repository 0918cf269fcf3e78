"""What the planner predicts for Helios-14B on more and more GPUs. All of it is modelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from helios_cp.config import Request
from helios_cp.hardware import PROFILES
from helios_cp.layout import smallest_tokens
from helios_cp.plan import BuiltInCheckpoint, make_plan, part_configs
from helios_cp.predict import Prediction, Workload

HARDWARE = ("h100", "h200")
STEPS = ((1, 1, 1), (2, 2, 2))
GPUS = (1, 2, 4, 8, 16)
PUBLISHED_FPS = 19.5
PUBLISHED = "published for Helios on one H100, [1, 1, 1]"


@dataclass(frozen=True)
class Line:
    """The fastest layout that fits, by GPUs, for one kind of card and the steps of the three stages."""

    hardware: str
    steps: tuple[int, ...]
    points: dict[int, Prediction]

    @property
    def label(self) -> str:
        return f"modelled, {self.hardware.upper()}, {list(self.steps)}"


def predict_lines(
    hardware: Sequence[str] = HARDWARE, steps: Sequence[tuple[int, ...]] = STEPS, gpus: Sequence[int] = GPUS
) -> list[Line]:
    """Helios-Distilled at 384 × 640 in bfloat16; up to 8 GPUs a node."""
    checkpoint = BuiltInCheckpoint.named("14b")
    lines = []
    for name in hardware:
        for each in steps:
            request = Request(prompt=("any",), pyramid_num_inference_steps_list=each).resolve(checkpoint)
            workload = Workload.of(checkpoint, request, torch.bfloat16, *part_configs(checkpoint))
            smallest = smallest_tokens(request, checkpoint)
            plans = {count: make_plan(workload, PROFILES[name], count, smallest).fitting for count in gpus}
            lines.append(Line(name, each, {count: plan[0] for count, plan in plans.items() if plan}))
    return lines


def layout_name(prediction: Prediction) -> str:
    """Degrees above 1, and how the VAE is decoded."""
    degrees = prediction.candidate.layout.degrees
    axes = {"CFG": degrees.cfg, "Ulysses": degrees.ulysses, "ring": degrees.ring}
    names = [f"{name} {degree}" for name, degree in axes.items() if degree > 1] or ["1 rank"]
    return f"{' × '.join(names)}, VAE {prediction.candidate.vae}"
