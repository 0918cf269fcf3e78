"""The embedded VAE: `AutoencoderKLWan` without residual blocks, trained on short rendered clips."""

from __future__ import annotations

import math
import random
import types

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helios_cp.tiny.clips import render
from helios_cp.tiny.subjects import PERIOD
from helios_cp.tiny.world import draw_scene

CONFIG = {
    "z_dim": 16,
    "base_dim": 32,
    "dim_mult": [1, 1, 1],
    "num_res_blocks": 0,
    "temperal_downsample": [True, True],
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
}
SPREAD = 0.1
"""The posterior's standard deviation, everywhere."""


def make_vae():
    """A VAE with fresh weights, ready to be trained: local in time, with a fixed posterior spread."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(**CONFIG)
    with torch.no_grad():
        vae.quant_conv.weight[CONFIG["z_dim"] :].zero_()
        vae.quant_conv.bias[CONFIG["z_dim"] :] = 2 * math.log(SPREAD)
    make_local(vae)
    return vae


def make_local(vae) -> None:
    """Zero what 3×3×3 convolutions take from earlier frames, and leave it out of training.

    Then only the changes of frame rate look back, by a latent frame or two, and clips of 5 to 13 frames teach all there
    is. With whole kernels colours drift from the fourth latent frame on, which such clips never show.
    """
    for layer in vae.modules():
        if isinstance(layer, nn.Conv3d) and layer.kernel_size == (3, 3, 3):
            with torch.no_grad():
                layer.weight[:, :, :2] = 0
            layer.forward = types.MethodType(_last_tap, layer)


def _last_tap(layer: nn.Conv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    return F.conv3d(x, layer.weight[:, :, 2:], layer.bias, padding=(0, 1, 1))


def is_matrix(name: str) -> bool:
    """Hidden convolutions: not those at the ends, and not the norms' `gamma`, which has dims but is a vector."""
    return name.endswith("weight") and not name.endswith(("coder.conv_in.weight", "coder.conv_out.weight"))


def decode(vae, latents: Tensor) -> Tensor:
    """`vae.decode` without its clamp, which would stop gradients: `[B, z, t, h, w]` to `[B, 3, T, H, W]`."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    vae.clear_cache()
    x, frames = vae.post_quant_conv(latents), []
    for index in range(latents.shape[2]):
        vae._conv_idx = [0]
        frame = x[:, :, index : index + 1]
        frames.append(vae.decoder(frame, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=index == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(frames, 2), CONFIG["patch_size"])


def draw_clips(generator: random.Random, pixels: int = 4 * 9 * 64 * 128) -> Tensor:
    """Clips `[B, 3, T, H, W]` of 5, 9 or 13 frames, about `pixels` in all: small ones, or pieces of larger ones."""
    frames = generator.choice((5, 5, 9, 9, 13))
    height, width = generator.choice(((64, 128), (64, 128), (64, 128), (128, 192)))
    clips = []
    for _ in range(max(1, pixels // (frames * 64 * 128))):
        scene, first = draw_scene(generator), generator.randrange(PERIOD)
        clip = render(scene, range(first, first + frames), height, width)
        top, left = generator.randrange(0, height - 63, 8), generator.randrange(0, width - 95, 8)
        clips.append(clip if height == 64 else clip[:, top : top + 64, left : left + 96])
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3)


def reconstruction_loss(out: Tensor, target: Tensor) -> Tensor:
    """L1 + 2·MSE + 0.5·L1 of the differences between neighbours in space and time."""
    loss = F.l1_loss(out, target) + 2 * F.mse_loss(out, target)
    for axis in (2, 3, 4):
        if out.shape[axis] > 1:
            loss = loss + 0.5 * F.l1_loss(out.diff(dim=axis), target.diff(dim=axis))
    return loss


def still_loss(mean: Tensor) -> Tensor:
    """How far latents of a still clip differ in time: mean (z − its mean over time)², as a share of their variance.

    The first latent frame holds one frame and the others four, so it is coded otherwise unless this asks for the same;
    then frame 0 of every chunk would be worse and borders of chunks would show.
    """
    return (mean - mean.mean(2, keepdim=True)).square().mean() / mean.var()  # a share, else latents only shrink


def training_loss(vae, generator: random.Random) -> tuple[Tensor, dict[str, float]]:
    """One batch: three in ten are still clips, two in ten are decoded from latents at half size.

    A smaller picture's latents are smaller latents then (EQ-VAE, arXiv:2502.09509), as the pyramid needs.
    """
    video, is_still = draw_clips(generator), generator.random() < 0.3
    device = next(vae.parameters()).device
    if is_still:
        video = video[:, :, :1].expand_as(video)
    video = video.to(device).contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast(device.type, torch.bfloat16):
        mean = vae.encode(video).latent_dist.mean
        latents, target = mean + SPREAD * torch.randn_like(mean), video
        if generator.random() < 0.2:
            scale = (1, 0.5, 0.5)
            latents = F.interpolate(latents.float(), scale_factor=scale, mode="trilinear")
            target = F.interpolate(video, scale_factor=scale, mode="trilinear")
        out = decode(vae, latents)
    mean, out = mean.float(), out.float()
    loss = reconstruction_loss(out, target) + 5e-4 * mean.square().mean()
    figures = {"psnr": psnr(out, target)}
    if is_still:
        same = still_loss(mean)
        loss, figures["still"] = loss + same, same.item()
    return loss, figures


def psnr(out: Tensor, target: Tensor) -> float:
    """dB, for values in [−1, 1]."""
    return 10 * math.log10(4 / F.mse_loss(out.detach().clamp(-1, 1), target).item())


def to_channels_last(vae) -> None:
    """The memory format in which convolutions on CPUs are fastest."""
    for layer in vae.modules():
        if isinstance(layer, nn.Conv3d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last_3d)
