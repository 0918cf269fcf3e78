"""VAEs of random weights: diffusers' and ours of the same, and how far one result is from another."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest import mock

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from helios_cp.model.vae import kernels
from helios_cp.model.vae.autoencoder import Autoencoder
from helios_cp.model.vae.config import VaeConfig

SMALL = {"z_dim": 4, "base_dim": 8, "dim_mult": (1, 2, 2, 2), "num_res_blocks": 1}


@cache
def _pair(options: tuple[tuple[str, Any], ...]) -> tuple[AutoencoderKLWan, Autoencoder]:
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in options}
    statistics = {"latents_mean": [0.5] * values["z_dim"], "latents_std": [2.0] * values["z_dim"]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = AutoencoderKLWan(**statistics | values).eval().requires_grad_(False)
        for name, parameter in theirs.named_parameters():
            if name.endswith("gamma"):  # ones would hide a scale that is left out
                parameter.uniform_(0.5, 1.5)
    ours = Autoencoder(VaeConfig.from_dict(theirs.config)).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def pair(**options: Any) -> tuple[AutoencoderKLWan, Autoencoder]:
    """Both of the same weights. They are shared between tests: copy one before changing it."""
    return _pair(tuple({**SMALL, **options}.items()))


def as_on_a_card():
    """Convolutions leave their biases and sums to the norms that follow, which on a CPU they do not."""
    return mock.patch.object(kernels, "_adds", lambda states: False)


def make_latents(vae, batch: int = 1, frames: int = 3, rows: int = 3, columns: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, vae.config.z_dim, frames, rows, columns, generator=generator)


def make_video(batch: int = 1, frames: int = 9, height: int = 25, width: int = 16, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(batch, channels, frames, height, width, generator=generator) * 2 - 1


def error(result: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the expected range."""
    assert result.shape == expected.shape and result.dtype == expected.dtype
    return ((result - expected).abs().max() / (expected.max() - expected.min())).item()
