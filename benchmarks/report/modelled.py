"""What the planner predicts for Helios-14B on more and more GPUs. All of it is modelled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from helios_cp.config.request import Request
from helios_cp.plan.choose import make_plan
from helios_cp.plan.hardware import MEASUREMENTS, PROFILES, Hardware, read_profile
from helios_cp.plan.predict import Prediction, Workload
from helios_cp.plan.workload import BuiltInCheckpoint

HARDWARE = ("h100", "h200")
STEPS = ((1, 1, 1), (2, 2, 2))
GPUS = (1, 2, 4, 8, 16)
PER_NODE = 8
CALIBRATED = "gpu_profile.json"
"""What `benchmarks.gpu_suite` makes of a card."""
PUBLISHED_FPS = 19.5
PUBLISHED = "published for Helios on one H100, [1, 1, 1]"


@dataclass(frozen=True)
class Line:
    """The fastest layout that fits, by GPUs, for one kind of card and the steps of the three stages."""

    hardware: str
    steps: tuple[int, ...]
    points: dict[int, Prediction]

    @property
    def title(self) -> str:
        return self.hardware.upper() if self.hardware in PROFILES else self.hardware

    @property
    def label(self) -> str:
        return f"modelled, {self.title}, {list(self.steps)}"


def predict_lines(
    hardware: Sequence[str] = HARDWARE, steps: Sequence[tuple[int, ...]] = STEPS, gpus: Sequence[int] = GPUS
) -> list[Line]:
    """Helios-Distilled at 384 × 640 in bfloat16; up to 8 GPUs a node."""
    return [_line(PROFILES[name], each, gpus) for name in hardware for each in steps]


def calibrated_lines(folder: Path, steps: Sequence[tuple[int, ...]] = STEPS, gpus: Sequence[int] = GPUS) -> list[Line]:
    """Likewise on the rates that were measured of a card, if the folder holds its profile; messages stay assumed.

    Raises `RequestError` for a profile that cannot be read.
    """
    path = folder / CALIBRATED
    if not path.exists():
        return []
    hardware = replace(read_profile(path), gpus_per_node=PER_NODE)
    measured = json.loads(path.read_text(encoding="utf-8")).get(MEASUREMENTS, {})
    if not measured.get("machine", {}).get("gpus"):  # a dry run on a CPU
        return []
    return [_line(hardware, each, gpus) for each in steps]


def _line(hardware: Hardware, steps: tuple[int, ...], gpus: Sequence[int]) -> Line:
    checkpoint = BuiltInCheckpoint.named("14b")
    request = Request(prompt=("any",), pyramid_num_inference_steps_list=steps).resolve(checkpoint)
    workload = Workload.of(checkpoint, request, torch.bfloat16)
    plans = {count: make_plan([workload], hardware, count).fitting for count in gpus}
    return Line(hardware.name, steps, {count: plan[0] for count, plan in plans.items() if plan})


def layout_name(prediction: Prediction) -> str:
    """Degrees above 1, and how the VAE is decoded."""
    degrees = prediction.candidate.layout.degrees
    axes = {"CFG": degrees.cfg, "Ulysses": degrees.ulysses, "ring": degrees.ring}
    names = [f"{name} {degree}" for name, degree in axes.items() if degree > 1] or ["1 rank"]
    return f"{' × '.join(names)}, VAE {prediction.candidate.vae}"
