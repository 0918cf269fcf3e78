"""How well videos follow their prompts: test prompts, and what the classifier says of the videos made for them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from helios_cp.tiny.captions import plain_prompt
from helios_cp.tiny.judge import Judge, compare, name
from helios_cp.tiny.latents import FRAMES
from helios_cp.tiny.world import Scene, draw_scene


def test_prompts(count: int, seed: int = 7) -> list[tuple[str, Scene]]:
    """Prompts that name everything, every third of a combination that was never trained on."""
    generator, made = random.Random(seed), []
    while len(made) < count:
        scene = draw_scene(generator, held_out=len(made) % 3 == 0)
        if scene.subject != "none":
            made.append((plain_prompt(scene), scene))
    return made


test_prompts.__test__ = False  # no test of pytest's


def verdict(judge: Judge, videos: Sequence[np.ndarray], prompts: Sequence[tuple[str, Scene]]) -> dict[str, Any]:
    """The share of labels as asked, of all prompts and of those held out, the mean seam, and what each video shows."""
    right: dict[str, dict[str, list[bool]]] = {"accuracy": defaultdict(list), "accuracy_held_out": defaultdict(list)}
    rows = []
    for video, (prompt, scene) in zip(videos, prompts, strict=True):
        named = name(judge, video)
        for key, is_right in compare(named, scene).items():
            right["accuracy"][key].append(is_right)
            if scene.is_held_out:
                right["accuracy_held_out"][key].append(is_right)
        rows.append({"prompt": prompt, "named": named, "held_out": scene.is_held_out, "seam": seam(video)})
    shares = {kind: {key: float(np.mean(v)) for key, v in labels.items()} for kind, labels in right.items()}
    seams = [row["seam"] for row in rows if row["seam"] is not None]
    return {**shares, "seam": float(np.mean(seams)) if seams else None, "videos": rows}


def seam(video: np.ndarray) -> float | None:
    """The mean change between frames at borders of chunks, over that inside chunks; None for a single chunk."""
    change = np.abs(np.diff(video.astype(np.float32), axis=0)).mean((1, 2, 3))
    borders = np.arange(FRAMES - 1, len(change), FRAMES)
    if not len(borders):
        return None
    return float(change[borders].mean() / max(np.delete(change, borders).mean(), 1e-6))
