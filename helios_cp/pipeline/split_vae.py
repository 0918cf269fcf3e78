"""The VAE split over the ranks of a group along the height, equal to the unsplit one.

Each rank runs diffusers' own `AutoencoderKLWan` on its rows alone. For the time of one call, the forwards of the layers
that look at other rows are replaced by ones that fetch them from the ranks that hold them: causal 3×3×3 convolutions,
the 3×3 convolution of a resampling, and the attention of the middle block. All other layers work row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import CACHE_T, WanAttentionBlock, WanCausalConv3d, WanResample
from torch import Tensor, nn

from parallel.collectives import Group
from parallel.halo import convolve, output_rows, upsampled_rows, with_halo
from parallel.segments import split

ROWS = 3  # dim of the rows in [B, C, T, h, w]


def split_decode(
    vae: AutoencoderKLWan,
    latents: Tensor,
    group: Group,
    finish: Callable[[Tensor], Tensor] | None = None,
    dim: int = ROWS,
) -> Tensor | None:
    """`vae.decode` over the ranks of `group`: `[B, 3, 4(T−1)+1, 8h, 8w]` in [−1, 1] on its rank 0, None elsewhere.

    `latents` `[B, C, T, h, w]` are what `vae.decode` takes, whole and equal on every rank. `finish` is run by each rank
    on its own rows of the video before these travel to rank 0, as for a conversion to bytes; it must work row by
    row, and `dim` is the dim of the rows in what it returns. Raises `ValueError` for more ranks than latent rows, a
    VAE of another kind, or a `finish` that does not keep the rows in `dim`.
    """
    finish = finish or (lambda video: video)
    if group.size == 1:
        return finish(vae.decode(latents, return_dict=False)[0])
    _check_kind(vae)
    rows = _split_rows(latents.shape[ROWS], group)
    levels = [upsampled_rows(rows, 2**level) for level in range(len(vae.config.dim_mult))]
    with _split_layers(vae, vae.decoder, group, levels):
        video = vae.decode(latents.split(rows, ROWS)[group.rank], return_dict=False)[0]
    return _gather(finish(video), group, levels[-1], dim)


def split_encode(vae: AutoencoderKLWan, video: Tensor | None, group: Group) -> Tensor | None:
    """`vae.encode` over the ranks of `group`: the posterior's parameters `[B, 2C, T', h, w]` on its rank 0, else None.

    They are what `DiagonalGaussianDistribution` takes. `video` `[B, 3, T, H, W]` in [−1, 1] is given on rank 0 and is
    None elsewhere; each rank is sent its rows, in the dtype and on the device of the VAE. Raises `ValueError` for no
    video on rank 0, more ranks than latent rows, or a VAE of another kind.
    """
    shape = group.broadcast_object(None if video is None else tuple(video.shape))
    if shape is None:
        raise ValueError("video None on rank 0 of the group: rank 0 must hold the whole video")
    if group.rank == 0:
        video = video.to(vae.device, vae.dtype)
    if group.size == 1:
        return vae.encode(video, return_dict=False)[0].parameters
    _check_kind(vae)
    factor = 2 ** (len(vae.config.dim_mult) - 1)
    rows = [factor * size for size in _split_rows(shape[ROWS] // factor, group)]
    rows[-1] += shape[ROWS] % factor  # too few for a row of latents
    levels = [tuple(rows)]
    while len(levels) < len(vae.config.dim_mult):
        levels.append(output_rows(levels[-1], kernel=3, stride=2, padding=(0, 1)))
    own = _scatter(vae, video, group, rows, shape)
    with _split_layers(vae, vae.encoder, group, levels):
        parameters = vae.encode(own, return_dict=False)[0].parameters
    return _gather(parameters, group, levels[-1], ROWS)


def _check_kind(vae: AutoencoderKLWan) -> None:
    """Raises `ValueError` for a VAE that cannot be split."""
    if not isinstance(vae, AutoencoderKLWan):
        raise ValueError(f"VAE {type(vae).__name__}: only an AutoencoderKLWan can be split; use 1 rank for the VAE")
    if vae.config.is_residual or vae.config.patch_size is not None:
        raise ValueError(
            f"VAE with is_residual {vae.config.is_residual} and patch_size {vae.config.patch_size}: only False and "
            "None can be split; use 1 rank for the VAE"
        )
    if vae.use_tiling:
        raise ValueError("VAE with tiling: it is not exact and cannot be split; call disable_tiling()")


def _split_rows(rows: int, group: Group) -> tuple[int, ...]:
    """Rows of the latents on each rank. Raises `ValueError` unless every rank has one."""
    if group.size > rows:
        raise ValueError(f"VAE over {group.size} ranks: at most {rows} are allowed, the rows of the latents")
    return split(rows, group.size)


def _scatter(
    vae: AutoencoderKLWan, video: Tensor | None, group: Group, rows: Sequence[int], shape: Sequence[int]
) -> Tensor:
    """This rank's rows of rank 0's video, of which each rank is sent its own only."""
    like = torch.empty(0, device=vae.device, dtype=vae.dtype)
    if group.rank > 0:
        own = (*shape[:ROWS], rows[group.rank], *shape[ROWS + 1 :])
        return group.exchange([], [(0, own)], like, "scatter").wait()[0]
    parts = video.split(rows, ROWS)
    group.exchange([(rank, parts[rank]) for rank in range(1, group.size)], [], like, "scatter").wait()
    return parts[0]


def _gather(own: Tensor, group: Group, rows: Sequence[int], dim: int) -> Tensor | None:
    """The rows of all ranks end to end on rank 0, None elsewhere."""
    if own.shape[dim] != rows[group.rank]:
        raise ValueError(
            f"result of shape {tuple(own.shape)} on rank {group.rank}: dim {dim} must keep its {rows[group.rank]} rows"
        )
    if group.rank > 0:
        group.exchange([(0, own)], [], own, "gather").wait()
        return None
    shapes = [(*own.shape[:dim], size, *own.shape[dim:][1:]) for size in rows]
    others = group.exchange([], [(rank, shapes[rank]) for rank in range(1, group.size)], own, "gather").wait()
    return torch.cat([own, *others], dim)


@contextmanager
def _split_layers(
    vae: AutoencoderKLWan, network: nn.Module, group: Group, levels: Sequence[tuple[int, ...]]
) -> Iterator[None]:
    """Let `network`, the encoder or decoder, run on this rank's rows; `levels` are all ranks' at each resolution."""
    rows = _Rows(group, {level[group.rank]: level for level in levels})
    forwards: dict[nn.Module, Callable[..., Tensor]] = {}
    for layer in network.modules():
        if isinstance(layer, WanCausalConv3d) and layer.kernel_size[1] > 1:
            forwards[layer] = _causal_convolution(layer, rows)
        elif isinstance(layer, WanResample):
            forwards[layer.resample] = _resampling(*layer.resample, rows)
        elif isinstance(layer, WanAttentionBlock):
            forwards[layer] = _attention(layer, rows)
    before = {layer: vars(layer).get("forward") for layer in forwards}
    try:
        for layer, forward in forwards.items():
            layer.forward = forward
        yield
    finally:
        for layer, forward in before.items():
            del layer.forward
            if forward is not None:
                layer.forward = forward
        vae.clear_cache()  # an exception would leave it full


@dataclass(frozen=True)
class _Rows:
    """The group, and every rank's rows by the rows that this rank has: it has another number at each resolution."""

    group: Group
    levels: Mapping[int, tuple[int, ...]]

    def with_halo(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor with those on either side that a kernel of 3 reads, zeros beyond the picture."""
        return with_halo(tensor, self.group, self.of(tensor), kernel=3, padding=(1, 1))

    def of(self, tensor: Tensor) -> tuple[int, ...]:
        return self.levels[tensor.shape[-2]]


def _causal_convolution(convolution: WanCausalConv3d, rows: _Rows) -> Callable[..., Tensor]:
    """Forward of a 3×3×3 convolution that sees two frames of the past, in the cache or zeros."""
    borders = None  # of the cached frames, kept here so that every frame's borders travel once only

    def forward(x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        nonlocal borders
        x = rows.with_halo(x)
        missing = CACHE_T
        if cache_x is not None:
            above, below = borders.split(1, dim=ROWS)
            x = torch.cat([torch.cat([above, cache_x, below], dim=ROWS), x], dim=2)
            missing -= cache_x.shape[2]
        borders = x[:, :, -CACHE_T:, :: x.shape[ROWS] - 1].clone()
        if missing:
            x = F.pad(x, (0, 0, 0, 0, missing, 0))
        return F.conv3d(x, convolution.weight, convolution.bias, padding=(0, 0, 1))

    return forward


def _resampling(resize: nn.Module, convolution: nn.Conv2d, rows: _Rows) -> Callable[[Tensor], Tensor]:
    """Forward of a padding by zeros to the right and below, or an upsampling, and of the 3×3 convolution after it."""

    def shrink(x: Tensor) -> Tensor:
        left, right, above, below = resize.padding
        return convolve(convolution, F.pad(x, (left, right)), rows.group, rows.of(x), (above, below))

    def grow(x: Tensor) -> Tensor:
        # Of each row of the halo, one of its two copies is needed. Before the upsampling it is half as wide.
        x = resize(rows.with_halo(x))[..., 1:-1, :]
        return F.conv2d(x, convolution.weight, convolution.bias, padding=(0, 1))

    return shrink if isinstance(resize, nn.ZeroPad2d) else grow


def _attention(block: WanAttentionBlock, rows: _Rows) -> Callable[[Tensor], Tensor]:
    """Forward of the attention of this rank's places over all places of their frame."""

    def forward(x: Tensor) -> Tensor:
        batch, channels, frames, height, width = x.shape
        own = block.norm(x.transpose(1, 2).flatten(0, 1))  # [B·T, C, h, w]
        # Its input travels, as K and V would be twice as much.
        whole = torch.cat(rows.group.all_gather(own, rows.of(own), dim=2), dim=2)
        weights = block.to_qkv.weight.split([channels, 2 * channels])
        biases = block.to_qkv.bias.split([channels, 2 * channels])
        query = F.conv2d(own, weights[0], biases[0])
        key, value = F.conv2d(whole, weights[1], biases[1]).chunk(2, dim=1)
        query, key, value = (  # [B·T, 1, h·w, C]
            tensor.flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for tensor in (query, key, value)
        )
        out = F.scaled_dot_product_attention(query, key, value)
        out = block.proj(out.squeeze(1).transpose(1, 2).reshape(own.shape))
        return x + out.view(batch, frames, channels, height, width).transpose(1, 2)

    return forward
