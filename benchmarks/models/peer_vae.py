"""diffusers' VAE of the weights of ours, to compare with."""

from __future__ import annotations

from dataclasses import asdict

import torch
from diffusers import AutoencoderKLWan
from torch import nn

from helios_cp.model.vae.autoencoder import Autoencoder


def peer_vae(ours: Autoencoder) -> AutoencoderKLWan:
    """As diffusers loads it: weights of their own, laid out channels first."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(ours.config).items()}
    with torch.device("meta"):
        theirs = AutoencoderKLWan(**values)
    weights = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(weights, assign=True)
    return theirs.eval().requires_grad_(False)


def to_channels_last(vae: nn.Module) -> nn.Module:
    """Lay the weights out channel by channel; a video follows where its convolutions are given one that is so."""
    for layer in vae.modules():
        if isinstance(layer, nn.Conv3d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    return vae
