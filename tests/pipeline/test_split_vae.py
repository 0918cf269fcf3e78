"""Unit and multi-rank gloo: the VAE split over the height against the unsplit one.

Tolerance: 1e-5 of the output's range. Both compute the same products in fp32, but kernels may add them in another order
for another height, which leaves 1e-6 of the range here and 2e-6 in a VAE of Wan's size. A halo or attention keys that
are missing leave more than 0.1, as `test_what_is_broken_is_seen` shows. Bytes and FLOPs are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import helios_cp.pipeline.split_vae
from benchmarks.ranks.pool import shared_pool
from helios_cp.model.codec import to_frames
from helios_cp.pipeline.split_vae import split_decode, split_encode
from parallel.collectives import Group, Meter
from parallel.segments import split
from tests.parallel.reference import world_group

TOLERANCE = 1e-5
SMALL = {"z_dim": 4, "base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
WIDTH = 3  # of the latents
FP32 = 4  # bytes

# (batch, latent frames, latent rows). Three frames meet an empty, a half and a full cache of the convolutions.
SHAPES = ((1, 3, 8), (2, 3, 9), (1, 3, 5), (1, 1, 9))


@cache
def make_vae(folder: Path | None = None) -> AutoencoderKLWan:
    """A tiny preset's VAE, or a small one with random weights, the same on every rank."""
    if folder is not None:
        return AutoencoderKLWan.from_pretrained(folder).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKLWan(**SMALL).eval()


def make_latents(vae, batch: int, frames: int, rows: int) -> torch.Tensor:
    shape = (batch, vae.config.z_dim, frames, rows, WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def make_video(batch: int, frames: int, rows: int, extra: int = 0) -> torch.Tensor:
    """A video of so many latent frames and rows, and of `extra` rows that make no latent row."""
    shape = (batch, 3, 4 * (frames - 1) + 1, 8 * rows + extra, 8 * WIDTH)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the expected range."""
    assert result.shape == expected.shape and result.dtype == expected.dtype
    return ((result - expected).abs().max() / (expected.max() - expected.min())).item()


def encode(vae, video: torch.Tensor) -> torch.Tensor:
    return vae.encode(video).latent_dist.parameters


# Equal to the unsplit VAE.


@torch.no_grad()
def run_split(rank: int, folder: Path | None, shape: tuple[int, int, int], extra: int = 0):
    vae, group = make_vae(folder), world_group()
    video = split_decode(vae, make_latents(vae, *shape), group)
    return video, split_encode(vae, make_video(*shape, extra) if rank == 0 else None, group)


def check_split(folder: Path | None, shape: tuple[int, int, int], ranks: int, extra: int = 0) -> None:
    (video, parameters), *others = shared_pool().run(run_split, folder, shape, extra, ranks=ranks)
    assert others == [(None, None)] * (ranks - 1)
    vae = make_vae(folder)
    assert error(video, vae.decode(make_latents(vae, *shape)).sample) < TOLERANCE
    assert error(parameters, encode(vae, make_video(*shape, extra))) < TOLERANCE


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_unsplit_vae(shape, ranks):
    check_split(None, shape, ranks)


@pytest.mark.parametrize("ranks", [2, 5])
def test_equals_the_vae_of_a_preset(presets, ranks):
    check_split(presets["tiny-base"] / "vae", (1, 3, 9), ranks)


def test_equals_the_unsplit_vae_on_8_ranks():
    check_split(None, (1, 3, 9), ranks=8)


def test_equals_the_unsplit_vae_at_a_height_that_8_does_not_divide():
    check_split(None, (1, 2, 5), ranks=3, extra=5)


@torch.no_grad()
def run_on_the_last_two(rank: int, shape: tuple[int, int, int]):
    process_group = dist.new_group([1, 2])
    if rank == 0:
        return None
    vae, group = make_vae(), Group.of(process_group)
    video = split_decode(vae, make_latents(vae, *shape), group)
    return video, split_encode(vae, make_video(*shape) if group.rank == 0 else None, group)


def test_rank_0_is_that_of_the_group():
    shape = (1, 2, 5)
    _, (video, parameters), last = shared_pool().run(run_on_the_last_two, shape, ranks=3)
    assert last == (None, None)
    assert error(video, make_vae().decode(make_latents(make_vae(), *shape)).sample) < TOLERANCE
    assert error(parameters, encode(make_vae(), make_video(*shape))) < TOLERANCE


def test_one_rank_runs_the_vae_itself():
    vae, group = make_vae(), Group(None, meter=Meter())
    latents, video = make_latents(vae, 2, 2, 5), make_video(2, 2, 5)
    assert torch.equal(split_decode(vae, latents, group), vae.decode(latents).sample)
    assert torch.equal(split_decode(vae, latents, group, torch.neg), -vae.decode(latents).sample)
    assert torch.equal(split_encode(vae, video, group), encode(vae, video))
    assert group.meter.total_calls == 0


# Frames are finished before they travel.


@torch.no_grad()
def run_finished(rank: int, shape: tuple[int, int, int]):
    group = world_group(Meter())
    frames = split_decode(
        make_vae(), make_latents(make_vae(), *shape), group, partial(to_frames, output_type="uint8"), 2
    )
    return frames, group.meter.sent_bytes["gather"]


def test_frames_travel_as_bytes():
    batch, frames, rows = shape = (2, 2, 5)
    (video, own), *others = shared_pool().run(run_finished, shape, ranks=3)
    expected = to_frames(make_vae().decode(make_latents(make_vae(), *shape)).sample, "uint8")
    assert video.shape == expected.shape and video.dtype == torch.uint8
    assert (video.int() - expected.int()).abs().max() <= 1  # a value between two levels may be rounded either way
    assert (video != expected).float().mean() < 1e-3
    row = batch * (4 * (frames - 1) + 1) * 8 * WIDTH * 3
    assert own == 0
    assert others == [(None, 8 * size * row) for size in split(rows, 3)[1:]]


# The VAE is left as it was.


def state(vae) -> list[dict]:
    """What each layer holds apart from what a run of the VAE itself leaves."""
    caches = ("_feat_map", "_enc_feat_map", "_conv_idx", "_enc_conv_idx", "_conv_num", "_enc_conv_num")
    return [{key: value for key, value in vars(layer).items() if key not in caches} for layer in vae.modules()]


@torch.no_grad()
def run_and_look_back(rank: int, shape: tuple[int, int, int], fails: bool) -> None:
    vae, group = make_vae(), world_group()
    latents, video = make_latents(vae, *shape), make_video(*shape)
    before = vae.decode(latents).sample, encode(vae, video)
    wrapped = vae.decoder.conv_in.forward
    vae.decoder.conv_in.forward = lambda *args: wrapped(*args)  # as a hook of accelerate does
    states = state(vae)
    if fails:
        hooks = [network.conv_out.register_forward_hook(stumble) for network in (vae.decoder, vae.encoder)]
        with pytest.raises(ArithmeticError):
            split_decode(vae, latents, group)
        with pytest.raises(ArithmeticError):
            split_encode(vae, video if rank == 0 else None, group)
        for hook in hooks:
            hook.remove()
    else:
        split_decode(vae, latents, group)
        split_encode(vae, video if rank == 0 else None, group)
    assert state(vae) == states
    assert set(vae._feat_map) == set(vae._enc_feat_map) == {None}
    assert torch.equal(vae.decode(latents).sample, before[0])
    assert torch.equal(encode(vae, video), before[1])
    del vae.decoder.conv_in.forward


def stumble(*_):
    raise ArithmeticError


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_the_vae_as_it_was(fails):
    shared_pool().run(run_and_look_back, (1, 2, 5), fails, ranks=2)


# Broken on purpose.


def no_halo():
    """Every rank pads with zeros as if it were alone."""

    def pad(tensor, group, rows, kernel, padding):
        return F.pad(tensor, (0, 0, *padding))

    return mock.patch.object(helios_cp.pipeline.split_vae, "with_halo", pad)


def no_halo_from_above():
    def below_only(*args, **options):
        tensor = with_halo(*args, **options)
        tensor[..., 0, :] = 0
        return tensor

    with_halo = helios_cp.pipeline.split_vae.with_halo
    return mock.patch.object(helios_cp.pipeline.split_vae, "with_halo", below_only)


def shrinking_without_the_row_below():
    def alone(convolution, tensor, group, rows, padding):
        return convolution(F.pad(tensor, (0, 0, *padding)))

    return mock.patch.object(helios_cp.pipeline.split_vae, "convolve", alone)


def attention_to_own_rows_only():
    return mock.patch.object(Group, "all_gather", lambda group, tensor, lengths, dim: [tensor])


@torch.no_grad()
def run_broken(rank: int, shape: tuple[int, int, int], broken):
    with broken():
        return run_split(rank, None, shape)


@pytest.mark.parametrize(
    ("broken", "decoder"),
    [
        (no_halo, True),
        (no_halo_from_above, True),
        (attention_to_own_rows_only, True),
        (shrinking_without_the_row_below, False),
    ],
)
def test_what_is_broken_is_seen(broken, decoder):
    shape = (1, 2, 5)
    video, parameters = shared_pool().run(run_broken, shape, broken, ranks=2)[0]
    if decoder:
        assert error(video, make_vae().decode(make_latents(make_vae(), *shape)).sample) > 0.1
    assert error(parameters, encode(make_vae(), make_video(*shape))) > 0.1


# Bytes and FLOPs.


def shown_bytes(network: nn.Module, run: Callable[[], object]) -> tuple[int, int]:
    """Bytes that a rank sends to its neighbours below and above, counted on the inputs of an unsplit run.

    Each frame that enters a layer that looks at other rows travels as one row each way, or only upwards where the layer
    shrinks.
    """
    downwards, upwards = [], []

    def count(layer: nn.Module, args: tuple) -> None:
        *places, _, width = args[0].shape
        if isinstance(layer, nn.Sequential) and isinstance(layer[0], nn.ZeroPad2d):
            upwards.append(math.prod(places) * (width + 1) * FP32)  # with the column of zeros on the right
        else:
            upwards.append(math.prod(places) * width * FP32)
            downwards.append(math.prod(places) * width * FP32)

    layers = [layer.resample for layer in network.modules() if isinstance(layer, WanResample)]
    layers += [layer for layer in network.modules() if isinstance(layer, WanCausalConv3d) and layer.kernel_size[1] == 3]
    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    run()
    for hook in hooks:
        hook.remove()
    return sum(downwards), sum(upwards)


@torch.no_grad()
def run_metered(rank: int, shape: tuple[int, int, int]) -> list[tuple[dict[str, int], int]]:
    """The bytes that this rank sends, and its FLOPs, in a decode and in an encode."""
    vae, found = make_vae(), []
    latents, video = make_latents(vae, *shape), make_video(*shape) if rank == 0 else None
    for run, tensor in ((split_decode, latents), (split_encode, video)):
        group = world_group(Meter())
        flops = count_flops(lambda run=run, tensor=tensor, group=group: run(vae, tensor, group))
        found.append((dict(group.meter.sent_bytes), flops))
    return found


def count_flops(run: Callable[[], object]) -> int:
    def attention(query, key, value, *_, **__) -> int:
        return sdpa_flop_count(query, key, value)

    cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=cpu) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("ranks", [3, 4])
def test_bytes_and_flops(ranks):
    """Borders travel once, the input of attention to all ranks, each rank's result to rank 0; FLOPs follow the rows."""
    batch, frames, rows = shape = (2, 3, 9)
    vae, sizes, last = make_vae(), split(rows, ranks), ranks - 1
    channels = SMALL["base_dim"] * SMALL["dim_mult"][-1]
    place = batch * frames * WIDTH
    latents, video = make_latents(vae, *shape), make_video(*shape)
    pixels = batch * video.shape[2] * video.shape[-1] * 3 * 8 * FP32  # bytes of 8 rows of the video
    found = shared_pool().run(run_metered, shape, ranks=ranks)
    for step, (network, run, result) in enumerate(
        [
            (vae.decoder, lambda: vae.decode(latents), pixels),
            (vae.encoder, lambda: vae.encode(video), place * 2 * SMALL["z_dim"] * FP32),
        ]
    ):
        downwards, upwards = shown_bytes(network, run)
        flops = count_flops(run)
        for rank, size in enumerate(sizes):
            sent, own_flops = found[rank][step]
            assert sent["halo"] == downwards * (rank < last) + upwards * (rank > 0)
            assert sent["all_gather"] == last * size * place * channels * FP32
            assert sent["gather"] == (size * result if rank else 0)
            assert sent.get("scatter", 0) == (sum(sizes[1:]) * pixels if step == 1 and rank == 0 else 0)
            keys_and_values = 2 * (rows - size) * place * channels * 2 * channels  # of the other ranks' places
            assert own_flops == flops * size // rows + keys_and_values
            assert keys_and_values < 0.01 * own_flops


# What does not fit is refused.


@torch.no_grad()
def run_refused(rank: int, video: torch.Tensor | None) -> str:
    with pytest.raises(ValueError) as refusal:
        split_encode(make_vae(), video if rank == 0 else None, world_group())
    return str(refusal.value)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (make_video(1, 1, 2), "VAE over 3 ranks: at most 2 are allowed, the rows of the latents"),
        (None, "video None on rank 0 of the group: rank 0 must hold the whole video"),
    ],
    ids=["too many ranks", "no video"],
)
def test_every_rank_refuses_to_encode(video, message):
    assert shared_pool().run(run_refused, video, ranks=3) == [message] * 3


def test_what_cannot_be_split_is_refused():
    two = Group(mock.sentinel.process_group, ranks=(0, 1))
    ten = Group(mock.sentinel.process_group, ranks=tuple(range(10)))
    latents = make_latents(make_vae(), 1, 1, 9)
    with pytest.raises(ValueError, match="VAE over 10 ranks: at most 9 are allowed, the rows of the latents"):
        split_decode(make_vae(), latents, ten)
    with pytest.raises(ValueError, match="is_residual True and patch_size None: only False and None can be split"):
        split_decode(AutoencoderKLWan(**SMALL, is_residual=True), latents, two)
    with pytest.raises(ValueError, match="is_residual False and patch_size 2: only False and None can be split"):
        split_decode(AutoencoderKLWan(**SMALL, patch_size=2, in_channels=12, out_channels=12), latents, two)
    with pytest.raises(ValueError, match="VAE AutoencoderKL: only an AutoencoderKLWan can be split"):
        split_decode(AutoencoderKL(), latents, two)
    tiled = AutoencoderKLWan(**SMALL)
    tiled.enable_tiling()
    with pytest.raises(ValueError, match="tiling: it is not exact and cannot be split"):
        split_decode(tiled, latents, two)


@torch.no_grad()
def run_wrong_dim(rank: int) -> str:
    with pytest.raises(ValueError) as refusal:
        split_decode(
            make_vae(), make_latents(make_vae(), 1, 1, 2), world_group(), partial(to_frames, output_type="uint8")
        )
    return str(refusal.value)


def test_wrong_dim_of_the_rows_is_refused():
    messages = shared_pool().run(run_wrong_dim, ranks=2)
    assert all("dim 3 must keep its 8 rows" in message for message in messages)
