"""A small classifier of two frames, trained on rendered ones, which says what a video shows."""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helios_cp.tiny.clips import render
from helios_cp.tiny.subjects import PERIOD
from helios_cp.tiny.text import LABELS
from helios_cp.tiny.world import Scene, draw_scene

APART = 4
"""Frames between the two that are looked at, so that motion can be seen."""
HEIGHT, WIDTH = 64, 128
WIDTHS = (6, 24, 48, 64, 96)


class Judge(nn.Module):
    """Scores of each label from pairs of frames `[B, 6, 64, W]` in [−1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(before, after, 3, 2, 1) for before, after in pairwise(WIDTHS))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in WIDTHS[1:])
        self.heads = nn.ModuleDict({key: nn.Linear(2 * WIDTHS[-1], len(values)) for key, values in LABELS.items()})

    def forward(self, pairs: Tensor) -> dict[str, Tensor]:
        x = pairs
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.silu(norm(convolution(x)))
        x = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        return {key: head(x) for key, head in self.heads.items()}


def embedded_judge() -> Judge:
    """The one that the package carries."""
    from safetensors.torch import load_file

    from helios_cp.weights.presets import EMBEDDED

    judge = Judge()
    judge.load_state_dict({key: value.float() for key, value in load_file(EMBEDDED / "judge.safetensors").items()})
    return judge.eval()


def device_of(judge: Judge) -> torch.device:
    return judge.heads["ground"].weight.device


def is_matrix(name: str) -> bool:
    return name.startswith("convolutions.") and name.endswith("weight")


def draw_pairs(generator: random.Random, count: int) -> tuple[Tensor, list[Scene]]:
    """Rendered pairs, half of them blurred, with some change of contrast, tint and noise: models are not as sharp."""
    scenes = [draw_scene(generator, held_out=generator.random() < 0.15) for _ in range(count)]
    firsts = [generator.randrange(PERIOD) for _ in scenes]
    frames = [render(s, (f, f + APART), HEIGHT, WIDTH) for s, f in zip(scenes, firsts, strict=True)]
    x = torch.from_numpy(np.stack(frames)).permute(0, 1, 4, 2, 3).flatten(1, 2)
    blurred = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1)
    x = torch.where(torch.rand(count, 1, 1, 1) < 0.5, blurred, x)
    tint = (0.05 * torch.randn(count, 3, 1, 1)).repeat(1, 2, 1, 1)
    x = x * (1 + 0.1 * torch.randn(count, 1, 1, 1)) + tint + 0.05 * torch.randn_like(x)
    return x.clamp(-1, 1), scenes


def visible(scene: Scene) -> dict[str, str]:
    """The labels that a picture of the scene shows: without a subject there is no colour and no motion."""
    labels = scene.labels
    return {key: labels[key] for key in labels if scene.subject != "none" or key not in ("colour", "direction")}


def training_loss(judge: Judge, generator: random.Random, count: int = 32) -> tuple[Tensor, dict[str, float]]:
    pairs, scenes = draw_pairs(generator, count)
    scores = judge(pairs.to(device_of(judge)))
    loss, figures = torch.zeros((), device=device_of(judge)), {}
    for key, values in LABELS.items():
        seen = [i for i, scene in enumerate(scenes) if key in visible(scene)]
        target = torch.tensor([values.index(visible(scenes[i])[key]) for i in seen], device=device_of(judge))
        loss = loss + F.cross_entropy(scores[key][seen], target)
        figures[key] = (scores[key][seen].argmax(-1) == target).float().mean().item()
    return loss, figures


@torch.no_grad()
def name(judge: Judge, video: np.ndarray) -> dict[str, str]:
    """What a video `[T, H, W, 3]` in uint8 shows, by the mean of the scores over eight pairs of frames."""
    firsts = np.linspace(0, len(video) - 1 - APART, 8).round().astype(int)
    frames = torch.from_numpy(video[np.concatenate([firsts, firsts + APART])]).permute(0, 3, 1, 2).float() / 127.5 - 1
    size = (HEIGHT, round(HEIGHT * video.shape[2] / video.shape[1]))
    pairs = torch.cat(F.interpolate(frames, size=size, mode="area").chunk(2), 1).to(device_of(judge))
    return {key: LABELS[key][int(v.softmax(-1).mean(0).argmax())] for key, v in judge(pairs).items()}


@torch.no_grad()
def accuracy(judge: Judge, count: int = 256, seed: int = 1) -> dict[str, float]:
    """The share of labels named right from single pairs as in training, every seventh of a held-out combination."""
    torch.manual_seed(seed)
    pairs, scenes = draw_pairs(random.Random(seed), count)
    scores = judge(pairs.to(device_of(judge)))
    right: dict[str, list[bool]] = {key: [] for key in LABELS}
    for index, scene in enumerate(scenes):
        named = {key: values[int(scores[key][index].argmax())] for key, values in LABELS.items()}
        for key, is_right in compare(named, scene).items():
            right[key].append(is_right)
    return {key: float(np.mean(values)) for key, values in right.items()}


def compare(named: Mapping[str, str], scene: Scene) -> dict[str, bool]:
    """Which visible labels of a scene were named."""
    return {key: named[key] == value for key, value in visible(scene).items()}
