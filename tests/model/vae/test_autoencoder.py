"""Unit: our VAE against diffusers' `AutoencoderKLWan` of the same weights.

Tolerance in fp32: 1e-5 of the range of the result. Both compute the same products, but a folded upsampling adds weights
before it multiplies, a SiLU and a norm round elsewhere, and kernels add in another order; that leaves 1e-6 here, 2e-6
at the width of Wan. Each trick that is broken on purpose leaves more than 1e-3. bfloat16 and float16 are held against
fp64: no further from it than diffusers' own, but for a tenth, as one pixel decides the largest difference.
"""

from __future__ import annotations

import contextlib
import copy
from unittest import mock

import pytest
import torch
from torch import nn

from helios_cp.model.codec import to_frames
from helios_cp.model.vae import kernels, layers, resampling
from helios_cp.model.vae.autoencoder import Autoencoder, patchify, unpatchify
from helios_cp.model.vae.config import VaeConfig
from helios_cp.model.vae.kernels import Sum, fusible_norm_silu, norm_silu
from helios_cp.model.vae.memory import choose_group, group_bytes
from helios_cp.model.vae.sweep import Sweep
from tests.model.vae.models import SMALL, as_on_a_card, error, make_latents, make_video, pair

TOLERANCE = 1e-5
BROKEN = 1e-3

VAES = {
    "small": {},
    "no blocks": {"dim_mult": (1, 1, 1, 1), "num_res_blocks": 0},
    "two blocks": {"base_dim": 16, "num_res_blocks": 2, "dim_mult": (1, 2, 4, 4)},
    "wide": {"base_dim": 96, "dim_mult": (1, 2), "num_res_blocks": 1, "temperal_downsample": (True,)},
    "three levels": {"dim_mult": (1, 2, 3), "temperal_downsample": (True, False)},
    "still": {"dim_mult": (2, 1, 2), "temperal_downsample": (False, False)},
    "decoder of its own width": {"decoder_base_dim": 12},
    "patches": {"dim_mult": (1, 2, 2), "temperal_downsample": (True, True), "patch_size": 2, "in_channels": 12}
    | {"out_channels": 12},
}
"""`dim_mult` and `num_res_blocks` as diffusers can build them: its encoder changes the width in residual blocks."""


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def check(theirs, ours, latents, video, groups=(None,)) -> None:
    frames, parameters = theirs.decode(latents).sample, theirs.encode(video).latent_dist.parameters
    for group in groups:
        assert error(ours.decode(latents, group), frames) < TOLERANCE
        assert error(ours.encode(video, group), parameters) < TOLERANCE


@pytest.mark.parametrize("name", VAES)
def test_equals_diffusers(name):
    theirs, ours = pair(**VAES[name])
    size = VAES[name].get("patch_size") or 1
    video = make_video(2, 10, 26, 16)  # a frame and rows that make no latent
    for frames in (1, 2, 5):
        check(theirs, ours, make_latents(ours, 2, frames), video[:, :, : 4 * frames - 2], groups=(None, 1, 2))
    assert ours.config.patch_size in (None, size)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 9, 10])
def test_every_grouping_of_a_chunk(group):
    theirs, ours = pair()
    check(theirs, ours, make_latents(ours, frames=9, rows=2, columns=3), make_video(1, 33, 16, 24), (group,))


@pytest.mark.parametrize("group", [None, 1, 2])
@pytest.mark.parametrize("name", ["small", "no blocks", "two blocks"])
def test_equals_diffusers_where_norms_make_the_sums(name, group):
    theirs, ours = pair(**VAES[name])
    with as_on_a_card():
        check(theirs, ours, make_latents(ours, 2, 4), make_video(2, 14), (group,))


def test_many_latent_frames():
    theirs, ours = pair()
    check(theirs, ours, make_latents(ours, frames=21, rows=2, columns=2), make_video(1, 81, 16, 16), (None, 4))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 4), (5, 1), (4, 7)])
def test_every_size(rows, columns):
    theirs, ours = pair()
    video = make_video(1, 5, 8 * rows + 5, 8 * columns + 3)
    check(theirs, ours, make_latents(ours, 1, 2, rows, columns), video)


def test_the_width_of_wan():
    """All of it, on one latent of two frames: 96 to 384 channels, two residual blocks, four levels."""
    theirs, ours = pair(base_dim=96, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=2)
    check(theirs, ours, make_latents(ours, 1, 2, 1, 2), make_video(1, 5, 8, 16))


def test_bytes_differ_by_one_level_at_most():
    theirs, ours = pair()
    latents = make_latents(ours, 2)
    videos = ours.decode(latents), theirs.decode(latents).sample
    frames, expected = (to_frames(video.movedim(1, -1), "uint8") for video in videos)
    assert (frames.int() - expected.int()).abs().max() <= 1
    assert (frames != expected).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [contextlib.nullcontext, as_on_a_card])
def test_half_precision_is_no_further_from_fp64(dtype, kind):
    vaes = [copy.deepcopy(each) for each in pair()]
    latents, video = make_latents(vaes[0], 1, 2, 2, 2), make_video(1, 5, 16, 16)
    off = []
    for vae in vaes:
        exact = [vae.double().decode(latents.double()), vae.encode(video.double())]
        with kind():
            low = [vae.to(dtype).decode(latents.to(dtype)), vae.encode(video.to(dtype))]
        if vae is vaes[0]:
            exact, low = ([decoded.sample, encoded.latent_dist.parameters] for decoded, encoded in (exact, low))
        off.append([(a - b).abs().mean().item() for a, b in zip(low, exact, strict=True)])
    theirs, ours = off
    assert all(0 < own <= 1.1 * other for own, other in zip(ours, theirs, strict=True))


def test_parameters_have_the_names_of_diffusers():
    theirs, ours = pair(**VAES["two blocks"])
    shapes = [{name: tensor.shape for name, tensor in vae.state_dict().items()} for vae in (theirs, ours)]
    assert shapes[0] == shapes[1]


# What is folded


def test_a_fold_follows_the_weights():
    """Loaded, cast, and written in place."""
    _, ours = pair()
    other = Autoencoder(ours.config)
    assert error(other.decode(make_latents(ours)), ours.decode(make_latents(ours))) > BROKEN
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other.decode(make_latents(ours)), ours.decode(make_latents(ours)))
    assert other.to(torch.bfloat16).decoder.up_blocks[0].upsamplers[0].resample[1].folded.dtype == torch.bfloat16
    other = copy.deepcopy(ours)
    for layer in other.decoder.modules():
        if isinstance(layer, resampling.FoldedUpsampling):
            layer.weight.neg_()
            layer.bias.neg_()
    other.fold()
    layer, changed = (vae.decoder.up_blocks[2].upsamplers[0].resample[1] for vae in (ours, other))
    states = torch.randn(1, 2, 3, 4, layer.in_channels)
    assert error(changed(states, Sweep()).total(), -layer(states, Sweep()).total()) < TOLERANCE


# Broken on purpose


def wrong_fold():
    """Odd rows and columns take what belongs to even ones."""
    fold = resampling.fold
    return mock.patch.object(resampling, "fold", lambda weight: fold(weight).flip(-1))


def no_carried_frame():
    return mock.patch.object(Sweep, "keep", lambda *_, **__: None)


def one_carried_frame():
    keep = Sweep.keep

    def keep_last(sweep, layer, states, frames=2):
        keep(sweep, layer, states, frames)
        if frames == 2 and not sweep.is_last:
            sweep._past[layer][:, 0] = 0

    return mock.patch.object(Sweep, "keep", keep_last)


def frame_0_in_the_past():
    """Frame 0 in the past of the layer that doubles frames."""
    double = resampling.Upsample._double

    def seen(upsample, states, sweep):
        if sweep.is_first and states.shape[1] > 1:
            sweep._past[upsample] = torch.stack([torch.zeros_like(states[:, 0]), states[:, 0]], 1)
        return double(upsample, states, sweep)

    return mock.patch.object(resampling.Upsample, "_double", seen)


@pytest.mark.parametrize(
    ("broken", "group"),
    [(wrong_fold, None), (no_carried_frame, 2), (one_carried_frame, 2), (frame_0_in_the_past, None)],
)
def test_what_is_broken_is_seen(broken, group):
    theirs, _ = pair()
    expected = theirs.decode(make_latents(theirs)).sample
    with broken():
        ours = Autoencoder(VaeConfig.from_dict(theirs.config))
        ours.load_state_dict(theirs.state_dict())
        assert error(ours.decode(make_latents(ours), group), expected) > BROKEN


@pytest.mark.parametrize("broken", [{"addend": None, "keep": False}, {"bias": None}, {"keep": False}])
def test_a_sum_that_is_broken_is_seen(broken):
    """Without its addend, without its bias, or not kept for the block that follows."""
    theirs, ours = pair()
    latents = make_latents(ours)

    def norm(states, weight, out, addend=None, bias=None, keep=False):
        norm_silu(states, weight, out, **{"addend": addend, "bias": bias, "keep": keep} | broken)

    with as_on_a_card(), mock.patch.object(ours, "norm_silu", norm):
        assert error(ours.decode(latents), theirs.decode(latents).sample) > BROKEN


@pytest.mark.parametrize("broken", [no_carried_frame, one_carried_frame])
def test_what_is_broken_is_seen_when_encoding(broken):
    theirs, ours = pair()
    video = make_video(1, 17)
    with broken():
        assert error(ours.encode(video, 2), theirs.encode(video).latent_dist.parameters) > BROKEN


# Memory and copies


def test_channels_come_last_all_the_way(monkeypatch):
    """Also where sums are left to norms, so that every convolution goes through `convolve`."""
    _, ours = pair()
    found = []

    def note(states, *arguments, **options):
        out = convolve(states, *arguments, **options)
        found.append(out.states.is_contiguous())
        return out

    convolve = kernels.convolve
    for module in (kernels, layers, resampling):
        monkeypatch.setattr(module, "convolve", note)
    with as_on_a_card():
        ours.decode(make_latents(ours))
        ours.encode(make_video())
    assert len(found) > 36 and all(found)
    for layer in ours.modules():
        if isinstance(layer, nn.Conv3d) and layer.kernel_size == (3, 3, 3):
            assert layer.weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_a_group_is_as_large_as_the_free_memory_allows():
    config, shape = VaeConfig(), (1, 16, 9, 48, 80)
    sizes = {group: group_bytes(config, group, 9, 48, 80) for group in (1, 2, 3, 5, 9)}
    assert sorted(sizes.values()) == list(sizes.values())
    for group, size in sizes.items():
        assert choose_group(config, shape, 4, int(size / 0.39)) == group
    assert choose_group(config, shape, 4, 0) == 1
    assert choose_group(config, (2, *shape[1:]), 4, int(sizes[9] / 0.39)) == 2
    assert choose_group(config, shape, 2, int(sizes[9] / 0.39 / 2)) == 9


def test_no_tensor_is_larger_than_kernels_can_count():
    config = VaeConfig()
    group = choose_group(config, (1, 16, 9, 90, 160), 4, 10**15)
    assert group == 5
    assert (4 * group + 2) * 96 * 720 * 1280 < 2**31 < (4 * 9) * 96 * 720 * 1280


# Kernels


@pytest.mark.parametrize(("in_cache", "blocks"), [(2**17, 1), (200, 6), (50, 18)])
def test_norm_and_silu(in_cache, blocks, monkeypatch):
    """In blocks and at once, into a part of a buffer, after a sum that is kept or not; zeros stay zeros."""
    monkeypatch.setattr(kernels, "ON_CPU", in_cache)
    plain, addend = torch.randn(2, 2, 3, 3, 5, 8)
    plain[0, 0, 0, 0] = 0
    bias, weight = torch.randn(8), torch.rand(8) + 0.5
    for terms, keep in (((), False), ((None, bias), False), ((addend, bias), False), ((addend, bias), True)):
        total = sum((term for term in terms if term is not None), start=plain)
        expected = nn.functional.silu(nn.functional.normalize(total, dim=-1) * 8**0.5 * weight)
        for kernel in (norm_silu, fusible_norm_silu):
            states, buffer = plain.clone(), torch.full((2, 5, 5, 5, 8), 7.0)
            kernel(states, weight, buffer[:, 2:, 1:-1], *terms, keep=keep)
            assert error(buffer[:, 2:, 1:-1], expected) < 1e-6
            assert (buffer[:, :2] == 7).all() and (buffer[:, :, 0] == 7).all()
            assert torch.equal(states, total if keep else plain)
    assert len(list(kernels._blocks(plain, addend))) == blocks


def test_a_sum_is_added_up_once(monkeypatch):
    """In blocks, over what is there or into a part of a buffer."""
    monkeypatch.setattr(kernels, "ON_CPU", 50)
    states, addend = torch.randn(2, 2, 3, 3, 5, 8)
    bias = torch.randn(8)
    for terms in ((None, None), (addend, None), (None, bias), (addend, bias)):
        expected = sum((term for term in terms if term is not None), start=states)
        for out in (None, torch.full((2, 5, 5, 5, 8), 7.0)[:, 2:, 1:-1]):
            left = Sum(states.clone(), *terms)
            total = left.total(out)
            assert error(total, expected) < 1e-6 and torch.equal(left.total(), total)
            assert out is None or total.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_convolution_is_added_to_what_is_there(dtype):
    states, total = torch.randn(2, 3, 4, 5, 8, dtype=dtype), torch.randn(2, 3, 4, 5, 6, dtype=dtype)
    layer = nn.Conv3d(8, 6, (1, 3, 3), padding=(0, 1, 1), dtype=dtype).requires_grad_(False)
    expected = total.double() + layer.double()(states.double().movedim(-1, 1)).movedim(1, -1)
    layer.to(dtype)
    found = kernels.convolve_onto(Sum(total), states, layer.weight, layer.bias, (0, 1, 1))
    assert found.states is total and found.addend is None and found.bias is None
    assert error(total.double(), expected) < (1e-2 if dtype == torch.bfloat16 else 1e-6)


# Configuration


def test_patches_go_there_and_back():
    video = torch.randn(2, 3, 4, 6, 5)
    assert patchify(video, 2).shape == (2, 3, 2, 3, 20)
    assert torch.equal(unpatchify(patchify(video, 2), 2), video)
    with pytest.raises(ValueError, match="video of 4 × 5 pixels: both must be multiples of patch_size 2"):
        patchify(video[:, :, :, :5], 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"is_residual": True}, "is_residual is True; only False is supported"),
        ({"attn_scales": [0.5]}, "attn_scales is"),
        ({"dim_mult": "1"}, "dim_mult is '1', which is not of type"),
    ],
)
def test_what_is_not_built_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        VaeConfig.from_dict({**SMALL, **values})
