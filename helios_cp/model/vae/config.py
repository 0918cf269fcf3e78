"""The switches of a VAE, under the names of its `config.json`. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from helios_cp.config.json_types import from_json

MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
FIXED = {"is_residual": False, "attn_scales": []}
"""Keys of diffusers' that allow more than is built here. No VAE of Wan 2.1 or Helios sets them otherwise."""


@dataclass(frozen=True)
class VaeConfig:
    """Sizes, and the statistics of the latents. Defaults are those of Helios-14B.

    The encoder is `base_dim` channels wide at the resolution of the video, the decoder `decoder_base_dim` (`None`: the
    same); `dim_mult` are the factors of the levels. Between two levels height and width halve, and where
    `temperal_downsample` (diffusers' spelling) says so, all frames but the first. `patch_size` p folds squares of p × p
    pixels into channels before the encoder, and unfolds them after the decoder.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    decoder_base_dim: int | None = None
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    latents_mean: tuple[float, ...] = MEAN
    latents_std: tuple[float, ...] = STD
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    @property
    def decoder_dim(self) -> int:
        """Channels of the decoder at the resolution of the video."""
        return self.decoder_base_dim or self.base_dim

    @property
    def levels(self) -> int:
        return len(self.dim_mult)

    @property
    def spatial(self) -> int:
        """Pixels to a side of a latent."""
        return 2 ** (self.levels - 1) * (self.patch_size or 1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VaeConfig:
        """Read a diffusers `vae/config.json`.

        Raises `ValueError` for a value of the wrong type, or a switch that would change the computation and is not
        supported.
        """
        for name, only in FIXED.items():
            if (values.get(name) or only) != only:
                raise ValueError(f"{name} is {values[name]}; only {only} is supported, as in the VAE of Wan 2.1")
        names = {field.name for field in dataclasses.fields(cls)}
        try:
            return from_json(cls, {name: value for name, value in values.items() if name in names})
        except TypeError as error:
            raise ValueError(str(error)) from None
