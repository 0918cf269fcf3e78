"""Videos of a model in training, sampled by the engine's own sampler, for judging and for looking at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from helios_cp.sampling.denoise import SamplingPlan, denoise
from helios_cp.sampling.noise import make_generators, normal
from helios_cp.tiny.forward import CHUNK, HISTORY, Past, embed_text, velocity
from helios_cp.tiny.text import tokenize
from helios_cp.weights.presets import PRESETS

STEPS = {"base": (20,), "mid": (8, 8, 8), "distilled": (2, 2, 2)}


def make_scheduler(variant: str):
    """The scheduler that checkpoints of a variant have."""
    import diffusers

    preset = PRESETS[f"tiny-{variant}"]
    return getattr(diffusers, preset.scheduler)(**preset.scheduler_config)


def make_plan(variant: str, guidance: float, steps: tuple[int, ...] | None = None) -> SamplingPlan:
    return SamplingPlan(
        steps=steps or STEPS[variant],
        is_pyramid=variant != "base",
        is_distilled=variant == "distilled",
        guidance_scale=1.0 if variant == "distilled" else guidance,
        is_cfg_zero_star=variant == "mid",
        zero_steps=1 if variant == "mid" else -1,
        amplify_first_chunk=False,
        sigmas=None,
        patch_size=(1, 2, 2),
    )


@torch.no_grad()
def sample(
    model,
    text_encoder,
    variant: str,
    prompts: Sequence[str],
    *,
    chunks: int,
    size: tuple[int, int],
    guidance: float = 2.0,
    steps: tuple[int, ...] | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Normalised latents `[B, C, 9, h, w]` of each chunk, for one video a prompt; `size` is (h, w)."""
    plan, scheduler = make_plan(variant, guidance, steps), make_scheduler(variant)
    device = next(model.parameters()).device
    texts = [encode(model, text_encoder, prompts)]
    if plan.is_guided:
        texts.append(encode(model, text_encoder, [""] * len(prompts)))
    generators = make_generators(range(seed, seed + len(prompts)))
    channels = model.config.in_channels
    past = Past(
        torch.zeros(len(prompts), channels, HISTORY, *size, device=device),
        torch.zeros(len(prompts), channels, 1, *size, device=device),
    )

    def predict(latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor | None]:
        times = timestep.float().expand(len(prompts))
        with torch.autocast(device.type, torch.bfloat16):
            outs = [velocity(model, latents, times, text, past) for text in texts]
        return (outs[0], outs[1]) if len(outs) > 1 else (outs[0], None)

    made = []
    for chunk in range(chunks):
        noise = normal((channels, CHUNK, *size), generators, device)
        *_, latents = denoise(noise, predict, plan, scheduler, generators, chunk=chunk, dtype=torch.float32)
        made.append(latents)
        anchor = past.anchor if chunk else latents[:, :, :1]
        past = Past(torch.cat([past.history, latents], 2)[:, :, -HISTORY:], anchor)
    return made


def encode(model, text_encoder, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The text as `velocity` takes it."""
    device = next(model.parameters()).device
    ids, mask = (value.to(device) for value in tokenize(prompts))
    with torch.autocast(device.type, torch.bfloat16):
        return embed_text(model, text_encoder(ids, mask).last_hidden_state, mask)


@torch.no_grad()
def decode(vae, mean: Tensor, std: Tensor, latents: Tensor) -> np.ndarray:
    """Frames `[B, 33, H, W, 3]` in uint8 of one chunk's normalised latents."""
    view = (1, -1, 1, 1, 1)
    with torch.autocast(latents.device.type, torch.bfloat16):
        videos = vae.decode(latents * std.view(view).to(latents.device) + mean.view(view).to(latents.device)).sample
    return ((videos.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()
