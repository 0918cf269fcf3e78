"""diffusers' own Helios pipelines as the reference, repaired where they are broken. Each repair is stated here.

1. `HeliosPyramidPipeline.sample_block_noise` factorises a singular covariance in fp32, which raises on a CPU. Here it
   is factorised in fp64; the draw from the generator is untouched.
2. In bf16 with `is_amplify_history` the fp32 key scale makes the keys fp32 and attention raises. Here the keys are
   rounded back to the model's dtype.
3. CFG-Zero* calls `view` on the transformer's output, which raises where the output is one token wide, as stage 1 of a
   64 × 64 video is. Here the output is made contiguous.
4. The finished video is cut to 4k + 1 frames (99 → 97). Here every chunk's frames are caught as the VAE decodes them.
"""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from diffusers.models.transformers import transformer_helios
from torch import Tensor


def load_reference(folder: Path, dtype: torch.dtype = torch.float32):
    """The checkpoint as a diffusers pipeline, its VAE in fp32."""
    vae = diffusers.AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, vae=vae, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    if isinstance(pipeline, diffusers.HeliosPyramidPipeline):
        pipeline.sample_block_noise = lambda *arguments: block_noise(pipeline.scheduler.config.gamma, *arguments)
    pipeline.transformer.register_forward_hook(lambda module, inputs, output: (output[0].contiguous(),))
    return pipeline


def block_noise(gamma, batch, channels, frames, height, width, patch_size, device, generator) -> Tensor:
    """Repair 1, written apart from `helios_cp.sampling.noise`: the same covariance by Cholesky in fp64."""
    _, ph, pw = patch_size
    size = ph * pw
    covariance = torch.eye(size, dtype=torch.float64) * (1 + gamma) - gamma + 1e-8 * torch.eye(size)
    factor = torch.linalg.cholesky(covariance).float()
    z = torch.randn(batch * channels * frames * (height // ph) * (width // pw), size, generator=generator)
    noise = (z @ factor.T).view(batch, channels, frames, height // ph, width // pw, ph, pw)
    return noise.permute(0, 1, 2, 3, 5, 4, 6).reshape(batch, channels, frames, height, width)


def run_reference(pipeline, seed: int, monkeypatch, with_frames: bool = True, **arguments) -> tuple[Tensor, Tensor]:
    """Latents `[B, C, 9·chunks, h, w]` of the generated chunks and frames `[B, 33·chunks, H, W, 3]` in [0, 1].

    Without frames nothing is decoded, and there is a black one of 1 × 1 a chunk.
    """
    latents, frames = [], []
    decode = pipeline.vae.decode
    mean = torch.tensor(pipeline.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    inverse_std = 1.0 / torch.tensor(pipeline.vae.config.latents_std).view(1, -1, 1, 1, 1)

    def watched_decode(z, return_dict=True):
        video = decode(z, return_dict=False)[0] if with_frames else z.new_full((len(z), 3, 1, 1, 1), -1)
        latents.append((z - mean) * inverse_std)
        frames.append((video / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1))
        return (video,)

    monkeypatch.setattr(pipeline.vae, "decode", watched_decode)
    monkeypatch.setattr(transformer_helios, "dispatch_attention_fn", same_dtype_attention)
    pipeline(generator=torch.Generator().manual_seed(seed), output_type="latent", **arguments)
    return torch.cat(latents, 2), torch.cat(frames, 1)


def same_dtype_attention(query, key, value, **_) -> Tensor:
    """Repair 2; in fp32 it changes nothing."""
    out = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.to(query.dtype).transpose(1, 2), value.transpose(1, 2)
    )
    return out.transpose(1, 2)
