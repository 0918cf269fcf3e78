"""The embedded VAE: `AutoencoderKLWan` without residual blocks. `components.py` sets its encoder."""

from __future__ import annotations

import math
import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONFIG = {
    "z_dim": 16,
    "base_dim": 48,
    "decoder_base_dim": 48,
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
    """A VAE with a fresh decoder, ready to be trained: local in time, with a fixed posterior spread."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(**CONFIG)
    with torch.no_grad():
        vae.post_quant_conv.weight[:, :, 0, 0, 0] = torch.eye(CONFIG["z_dim"])
        vae.post_quant_conv.bias.zero_()
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


def reconstruction_loss(out: Tensor, target: Tensor) -> Tensor:
    """L1 + 40·MSE + 0.5·L1 of the differences between neighbours in space and time."""
    loss = F.l1_loss(out, target) + 40 * F.mse_loss(out, target)
    for axis in (2, 3, 4):
        if out.shape[axis] > 1:
            loss = loss + 0.5 * F.l1_loss(out.diff(dim=axis), target.diff(dim=axis))
    return loss


def psnr(out: Tensor, target: Tensor) -> float:
    """dB, for values in [−1, 1]."""
    return 10 * math.log10(4 / F.mse_loss(out.detach().clamp(-1, 1), target).item())


def to_channels_last(vae) -> None:
    """The memory format in which convolutions on CPUs are fastest."""
    for layer in vae.modules():
        if isinstance(layer, nn.Conv3d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last_3d)
