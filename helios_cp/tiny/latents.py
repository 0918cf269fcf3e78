"""Clips as latents on disk: rendered and encoded once, read whole by the training of the transformers."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from helios_cp.files.whole_files import write_tensors
from helios_cp.tiny.clips import render
from helios_cp.tiny.world import Scene, draw_scene

FRAMES, CHUNKS = 33, 2
"""Frames of a chunk, and chunks of a clip: what is rendered repeats after them."""
SHARD = 40


class Clips:
    """All clips of a folder, less the mean of its first shard.

    `chunks` `[N, 2, C, 9, h, w]`, `stills` `[N, C, 1, h, w]` (what a picture repeated for a chunk ends in), and
    `subject` `[N, 2, 1, 9, h, w]`, 1 where the subject is.
    """

    def __init__(self, folder: Path) -> None:
        shards = [_read(path) for path in sorted(folder.glob("clips-*.safetensors"))]
        self.scenes = [scene for _, scenes in shards for scene in scenes]
        chunks = torch.cat([tensors["chunks"] for tensors, _ in shards]).float()
        stills = torch.cat([tensors["stills"] for tensors, _ in shards]).float()
        self.subject = torch.cat([tensors["subject"] for tensors, _ in shards]).float()
        self.mean, self.std = statistics(shards[0][0]["chunks"].float())
        view = (1, -1, 1, 1, 1)
        self.chunks = (chunks - self.mean.view(1, *view)) / self.std.view(1, *view)
        self.stills = (stills - self.mean.view(view)) / self.std.view(view)


def statistics(chunks: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[C]` of `[N, 2, C, T, h, w]`, and what latents are divided by: 1, because the encoder scales them."""
    mean = chunks.mean((0, 1, 3, 4, 5))
    return mean, torch.ones_like(mean)


def _read(path: Path) -> tuple[dict[str, Tensor], list[Scene]]:
    with safe_open(path, "pt") as file:
        scenes = [Scene(**values) for values in json.loads(file.metadata()["scenes"])]
        return {name: file.get_tensor(name) for name in ("chunks", "stills", "subject")}, scenes


@torch.no_grad()
def write_clips(vae, folder: Path, count: int, *, seed: int, height: int, width: int) -> None:
    """Write shards until the folder holds `count` clips. What is there stays; a shard appears whole or not at all."""
    for index in range(-(-count // SHARD)):
        path = folder / f"clips-{index:04}.safetensors"
        if path.exists():
            continue
        generator = random.Random(f"{seed} {index}")
        scenes = [draw_scene(generator) for _ in range(SHARD)]
        parts = [encode_scene(vae, scene, height, width) for scene in scenes]
        tensors = {name: torch.stack([part[name] for part in parts]).contiguous() for name in parts[0]}
        write_tensors(path, tensors, {"scenes": json.dumps([dataclasses.asdict(scene) for scene in scenes])})
        print(f"{path}: {(index + 1) * SHARD} clips", flush=True)


def encode_scene(vae, scene: Scene, height: int, width: int) -> dict[str, Tensor]:
    """`chunks` `[2, C, 9, h, w]`, each encoded alone as it is decoded; `stills` and `subject`; see `Clips`. Not yet
    normalised, in fp16."""
    video = render(scene, range(FRAMES * CHUNKS), height, width)
    chunks = encode(vae, video.reshape(CHUNKS, FRAMES, *video.shape[1:]))
    still = encode(vae, np.repeat(video[None, :1], 9, 1))[0, :, -1:]  # later frames would repeat its last latent
    return {"chunks": chunks.half(), "stills": still.half(), "subject": subject_mask(scene, height, width).half()}


def encode(vae, videos: np.ndarray) -> Tensor:
    """Posterior means `[N, C, t, h, w]` of `[N, T, H, W, 3]` in [−1, 1]."""
    device = next(vae.parameters()).device
    pixels = torch.from_numpy(videos).permute(0, 4, 1, 2, 3).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        means = vae.encode(pixels.contiguous(memory_format=torch.channels_last_3d)).latent_dist.mean
    return means.float().cpu()


def subject_mask(scene: Scene, height: int, width: int) -> Tensor:
    """`[2, 1, 9, h, w]`, 1 where the subject is: where the picture changes with the subject's colour."""
    frames = [0 if t == 0 else 4 * t - 1 for t in range(9)]
    numbers = [FRAMES * chunk + frame for chunk in range(CHUNKS) for frame in frames]
    other = dataclasses.replace(scene, colour="blue" if scene.colour == "white" else "white")
    pictures = [render(each, numbers, height // 4, width // 4) for each in (scene, other)]
    change = torch.from_numpy(np.abs(pictures[0] - pictures[1]).max(-1))
    return F.max_pool2d((change > 0.1).float(), 2).unflatten(0, (CHUNKS, 9))[:, None]
