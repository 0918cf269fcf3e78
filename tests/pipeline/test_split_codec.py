"""Unit and multi-rank gloo: the VAE split over the height against diffusers' unsplit one.

Tolerance: 1e-5 of the output's range, as for the whole VAE in `tests/model/vae`. A halo or attention keys that are
missing leave more than 0.02, as `test_what_is_broken_is_seen` shows. Bytes, calls and FLOPs are exact.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist

import helios_cp.pipeline.split_codec
from benchmarks.measuring.counting import count
from benchmarks.ranks.pool import shared_pool
from helios_cp.model.codec import Codec, latent_statistics
from helios_cp.pipeline.split_codec import SplitCodec, SplitRows
from helios_cp.plan.vae_cost import TAPS, decoder_layers
from helios_cp.runtime.compilation import compile_vae
from parallel.collectives import Group, Meter
from parallel.segments import split
from tests.model.vae import models
from tests.model.vae.models import SMALL, as_on_a_card, error
from tests.parallel.reference import world_group

TOLERANCE = 1e-5
BROKEN = 0.02
WIDTH = 3  # of the latents
FP32 = 4  # bytes
PATCHES = {"dim_mult": (1, 2, 2), "temperal_downsample": (True, True), "patch_size": 2, "in_channels": 12}
PATCHES |= {"out_channels": 12}

# (batch, latent frames, latent rows)
SHAPES = ((1, 3, 8), (2, 3, 9), (1, 3, 5), (1, 1, 9))


def make_latents(batch: int, frames: int, rows: int) -> torch.Tensor:
    return models.make_latents(models.pair()[1], batch, frames, rows, WIDTH)


def make_video(batch: int, frames: int, rows: int, extra: int = 0) -> torch.Tensor:
    """A video of so many latent frames and rows, and of `extra` rows that make no latent row."""
    return models.make_video(batch, 4 * (frames - 1) + 1, 8 * rows + extra, 8 * WIDTH)


def expected(shape: tuple[int, int, int], extra: int = 0, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames in [0, 1] and the parameters of the posterior, by diffusers."""
    theirs, _ = models.pair(**options)
    mean, inverse_std = latent_statistics(theirs)
    video = theirs.decode(make_latents(*shape) / inverse_std + mean).sample
    return (video / 2 + 0.5).movedim(1, -1), theirs.encode(make_video(*shape, extra)).latent_dist.parameters


# Equal to the unsplit VAE.


def run(rank: int, group: Group, shape, extra: int = 0, vae_group: int | None = None, **options):
    codec = SplitCodec(models.pair(**options)[1], group)
    codec.group = vae_group
    frames = codec.decode(make_latents(*shape), "float")
    (posterior,) = codec.encode([make_video(*shape, extra) if rank == 0 else None])
    return frames, posterior


@torch.no_grad()
def run_split(rank: int, shape, extra: int = 0, vae_group: int | None = None, options: dict | None = None):
    return run(rank, world_group(), shape, extra, vae_group, **options or {})


def check_split(shape, ranks: int, extra: int = 0, vae_group: int | None = None, **options) -> None:
    found, *others = shared_pool().run(run_split, shape, extra, vae_group, options, ranks=ranks)
    assert others == [(None, None)] * (ranks - 1)
    for mine, theirs in zip(found, expected(shape, extra, **options), strict=True):
        assert error(mine, theirs) < TOLERANCE


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_unsplit_vae(shape, ranks):
    check_split(shape, ranks)


@pytest.mark.parametrize("vae_group", [1, 2])
def test_in_groups_of_frames(vae_group):
    check_split((1, 4, 5), 3, vae_group=vae_group)


def test_equals_the_unsplit_vae_on_8_ranks():
    check_split((1, 3, 9), ranks=8)


def test_equals_the_unsplit_vae_at_a_height_that_8_does_not_divide():
    check_split((1, 2, 5), ranks=3, extra=5)


def test_equals_the_unsplit_vae_of_patches():
    check_split((1, 2, 5), ranks=3, extra=6, **PATCHES)


@torch.no_grad()
def run_on_the_last_two(rank: int, shape):
    process_group = dist.new_group([1, 2])
    return run(rank - 1, Group.of(process_group), shape) if rank else None


def test_rank_0_is_that_of_the_group():
    shape = (1, 2, 5)
    _, found, last = shared_pool().run(run_on_the_last_two, shape, ranks=3)
    assert last == (None, None)
    for mine, theirs in zip(found, expected(shape), strict=True):
        assert error(mine, theirs) < TOLERANCE


@torch.no_grad()
def test_one_rank_runs_the_vae_itself():
    group = Group(None, meter=Meter())
    split_codec, codec = SplitCodec(models.pair()[1], group), Codec(models.pair()[1])
    latents, video = make_latents(2, 2, 5), make_video(2, 2, 5)
    assert torch.equal(split_codec.decode(latents, "uint8"), codec.decode(latents, "uint8"))
    assert torch.equal(split_codec.encode([video])[0], codec.encode([video])[0])
    assert group.meter.total_calls == 0


@as_on_a_card()
@torch.no_grad()
def run_compiled(rank: int, shape):
    """Norms compiled by no compiler, so that what is exchanged between them is what is tested."""
    codec = SplitCodec(models.pair(base_dim=4)[1], world_group())
    compile_vae(codec.vae, "eager")
    frames = codec.decode(make_latents(*shape), "float")
    (posterior,) = codec.encode([make_video(*shape) if rank == 0 else None])
    return frames, posterior


def test_a_split_vae_is_compiled():
    found = shared_pool().run(run_compiled, (1, 2, 5), ranks=2)[0]
    for mine, theirs in zip(found, expected((1, 2, 5), base_dim=4), strict=True):
        assert error(mine, theirs) < TOLERANCE


@torch.no_grad()
def run_of_unequal_memory(rank: int, frames: int):
    codec = SplitCodec(models.pair()[1], world_group())
    with mock.patch("helios_cp.model.codec.choose_group", lambda *_: 3 - rank):
        codec.decode(make_latents(1, frames, 5), "uint8")
    return codec.last_group


def test_ranks_agree_on_the_groups():
    """On what the rank with least memory can do; else they would wait for each other for ever."""
    assert shared_pool().run(run_of_unequal_memory, 5, ranks=2) == [2, 2]


# Broken on purpose.


def no_halo():
    """Every rank pads with zeros as if it were alone."""

    def alone(buffer, group, dim, above, below):
        buffer[:, :, :above] = 0
        buffer[:, :, buffer.shape[2] - below :] = 0

    return mock.patch.object(helios_cp.pipeline.split_codec, "fetch_borders", alone)


def no_halo_from_above():
    fetch = helios_cp.pipeline.split_codec.fetch_borders

    def below_only(buffer, group, dim, above, below):
        fetch(buffer, group, dim, above, below)
        buffer[:, :, :above] = 0

    return mock.patch.object(helios_cp.pipeline.split_codec, "fetch_borders", below_only)


def shrinking_without_the_row_below():
    fetch = helios_cp.pipeline.split_codec.fetch_borders

    def all_but_that(buffer, group, dim, above, below):
        fetch(buffer, group, dim, above, below)
        if not above:
            buffer[:, :, -1] = 0

    return mock.patch.object(helios_cp.pipeline.split_codec, "fetch_borders", all_but_that)


def attention_to_own_rows_only():
    return mock.patch.object(SplitRows, "gather", lambda rows, states: states)


@torch.no_grad()
def run_broken(rank: int, shape, broken):
    with broken():
        return run(rank, world_group(), shape)


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
    frames, parameters = shared_pool().run(run_broken, (1, 2, 5), broken, ranks=2)[0]
    exact_frames, exact_parameters = expected((1, 2, 5))
    if decoder:
        assert error(frames, exact_frames) > BROKEN
    assert error(parameters, exact_parameters) > BROKEN


# Bytes, calls and FLOPs.


def border_rows(shape) -> tuple[int, int, int]:
    """Of a decoding: layers that look at other rows, elements of a row of all their inputs, and FLOPs of the whole."""
    batch, frames, _ = shape
    config, latents = models.pair()[1].config, make_latents(*shape)
    elements, layers = 0, 0
    for layer in decoder_layers(config, frames):
        if layer.weights in (TAPS, 9):
            width = WIDTH * 2 ** (layer.level - (layer.weights == 9))
            elements += batch * layer.frames * layer.inputs * width
            layers += 1
    return layers, elements, count(models.pair()[1].decode, latents).flops


@torch.inference_mode()
def run_metered(rank: int, shape):
    """The bytes that this rank sends, and the calls and FLOPs of a decode and an encode."""
    found = []
    for what in ("decode", "encode"):
        group = world_group(Meter())
        codec = SplitCodec(models.pair()[1], group)
        codec.group = shape[1]
        if what == "decode":
            flops = count(codec.decode, make_latents(*shape), "uint8").flops
        else:
            flops = count(codec.encode, [make_video(*shape) if rank == 0 else None]).flops
        found.append((dict(group.meter.sent_bytes), dict(group.meter.calls), flops))
    return found


@pytest.mark.parametrize("ranks", [3, 4])
def test_bytes_calls_and_flops(ranks):
    """Borders travel once for all frames of a layer, the input of attention to all ranks, frames to rank 0 as bytes."""
    batch, frames, rows = shape = (2, 3, 9)
    sizes, last = split(rows, ranks), ranks - 1
    channels = SMALL["base_dim"] * SMALL["dim_mult"][-1]
    place = batch * frames * WIDTH
    layers, elements, flops = border_rows(shape)
    found = shared_pool().run(run_metered, shape, ranks=ranks)
    for rank, size in enumerate(sizes):
        (sent, calls, own_flops), (encoded, _, _) = found[rank]
        assert sent["halo"] == elements * FP32 * ((rank < last) + (rank > 0))
        assert calls["halo"] == layers
        assert sent["all_gather"] == encoded["all_gather"] == last * size * place * channels * FP32
        assert sent["gather"] == (size * batch * (4 * frames - 3) * 8 * 8 * WIDTH * 3 if rank else 0)
        pixels = batch * (4 * frames - 3) * 3 * 8 * WIDTH * 8 * FP32
        assert encoded.get("scatter", 0) == (0 if rank else sum(sizes[1:]) * pixels)
        keys_and_values = 2 * (rows - size) * place * channels * 2 * channels  # of the other ranks' places
        assert own_flops == flops * size // rows + keys_and_values
        assert keys_and_values < 0.02 * own_flops


def test_frames_travel_in_fewer_messages_than_one_by_one():
    """Nine latent frames that go through together exchange rows once, where one at a time would nine times."""
    together, alone = (shared_pool().run(run_grouped, (1, 9, 4), group, ranks=2)[0] for group in (9, 1))
    assert together["sent"] == alone["sent"]
    assert 9 * together["calls"] == alone["calls"] > 9 * 20


@torch.no_grad()
def run_grouped(rank: int, shape, vae_group: int):
    group = world_group(Meter())
    codec = SplitCodec(models.pair()[1], group)
    codec.group = vae_group
    codec.decode(make_latents(*shape), "uint8")
    return {"sent": group.meter.sent_bytes["halo"], "calls": group.meter.calls["halo"]}


# What does not fit is refused.


@torch.no_grad()
def run_refused(rank: int, video: torch.Tensor | None) -> str:
    codec = SplitCodec(models.pair()[1], world_group())
    with pytest.raises(ValueError) as refusal:
        codec.encode([video if rank == 0 else None])
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


def test_too_many_ranks_are_refused():
    ten = Group(mock.sentinel.process_group, ranks=tuple(range(10)))
    with pytest.raises(ValueError, match="VAE over 10 ranks: at most 9 are allowed, the rows of the latents"):
        SplitCodec(models.pair()[1], ten).decode(make_latents(1, 1, 9), "uint8")


def test_a_rank_without_a_vae_has_nothing_to_do():
    codec = SplitCodec(None, Group(None))
    assert not codec.is_local and codec.last_group is None
    assert codec.decode(make_latents(1, 1, 2), "uint8") is None and codec.encode([None]) == [None]
