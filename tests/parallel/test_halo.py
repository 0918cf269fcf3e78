"""Unit and multi-rank gloo: convolutions split over the height against unsplit ones.

Both compute the same products in fp64, but kernels may add them in another order for another height: a few hundred
products leave rounding errors below 1e-13.
"""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import parallel.halo
from parallel.collectives import Meter
from parallel.halo import convolve, fetch_rows, output_rows, upsampled_rows, with_halo
from parallel.segments import offsets, split
from tests.parallel.reference import world_group

TOLERANCE = 1e-13
CHANNELS, WIDTH = 3, 5


def _convolution(kind, *args, **options):
    torch.manual_seed(0)
    return kind(CHANNELS, CHANNELS, *args, **options).double()


def _picture(rows, frames=None):
    shape = (2, CHANNELS, rows, WIDTH) if frames is None else (2, CHANNELS, frames, rows, WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _own(rank, tensor, rows):
    return tensor.split(list(rows), dim=-2)[rank]


def _difference(rank, out, expected, rows):
    assert sum(rows) == expected.shape[-2]
    expected = _own(rank, expected, rows)
    assert out.shape == expected.shape
    return (out - expected).abs().max().item()


# (class, arguments, options, padding above and below in place of the convolution's own)
CONVOLUTIONS = {
    "3×3": (nn.Conv2d, (3,), {"padding": 1}, None),
    "1×1": (nn.Conv2d, (1,), {}, None),
    "5×5, halo past a neighbour of one row": (nn.Conv2d, (5,), {"padding": 2}, None),
    "4×3, asymmetric": (nn.Conv2d, ((4, 3),), {"padding": (0, 1)}, (1, 2)),
    "dilated": (nn.Conv2d, (3,), {"padding": 2, "dilation": 2}, None),
    "replicate": (nn.Conv2d, (3,), {"padding": (1, 1), "padding_mode": "replicate"}, None),
    "grouped, no bias": (nn.Conv2d, (3,), {"padding": 1, "groups": 3, "bias": False}, None),
    "3×3×3": (nn.Conv3d, (3,), {"padding": 1}, None),
    "3×3×3, replicate": (nn.Conv3d, (3,), {"padding": 1, "padding_mode": "replicate"}, None),
}


def _stride_1_errors(rank, rows):
    group = world_group()
    errors = {}
    for name, (kind, args, options, padding) in CONVOLUTIONS.items():
        convolution = _convolution(kind, *args, **options)
        whole = _picture(sum(rows), 4 if kind is nn.Conv3d else None)
        padded = whole if padding is None else F.pad(whole, (0, 0, *padding))
        out = convolve(convolution, _own(rank, whole, rows), group, rows, padding)
        errors[name] = _difference(rank, out, convolution(padded), rows)
    return errors


def _uneven_heights(size):
    yield (1,) * size
    yield tuple(1 + (3 * rank) % 4 for rank in range(size))
    yield split(2 * size + 1, size)


@torch.no_grad()
def _all_stride_1_errors(rank, heights):
    return {(rows, name): error for rows in heights for name, error in _stride_1_errors(rank, rows).items()}


@pytest.mark.parametrize("size", range(1, 9))
def test_equals_the_unsplit_convolution(ranks, size):
    for errors in ranks.run(_all_stride_1_errors, tuple(_uneven_heights(size)), ranks=size):
        assert max(errors.values()) < TOLERANCE, errors


@torch.no_grad()
def _downsampling_errors(rank, heights):
    """`ZeroPad2d((0, 1, 0, 1))` and a convolution of stride 2, and one with symmetric padding."""
    group = world_group()
    errors = {}
    for rows in heights:
        whole = _picture(sum(rows))
        wide = F.pad(whole, (0, 1))
        strided = _convolution(nn.Conv2d, 3, stride=2)
        kept = output_rows(rows, kernel=3, stride=2, padding=(0, 1))
        out = convolve(strided, _own(rank, wide, rows), group, rows, padding=(0, 1))
        errors[rows, "below"] = _difference(rank, out, strided(F.pad(wide, (0, 0, 0, 1))), kept)
        symmetric = _convolution(nn.Conv2d, 3, stride=2, padding=1)
        kept = output_rows(rows, kernel=3, stride=2, padding=(1, 1))
        out = convolve(symmetric, _own(rank, whole, rows), group, rows)
        errors[rows, "both"] = _difference(rank, out, symmetric(whole), kept)
    return errors


@pytest.mark.parametrize("size", range(1, 9))
def test_equals_the_unsplit_downsampling(ranks, size):
    heights = ((2,) * size, tuple(2 + 2 * (rank % 3) for rank in range(size)), split(3 * size + 1, size))
    for errors in ranks.run(_downsampling_errors, heights, ranks=size):
        assert max(errors.values()) < TOLERANCE, errors


def _causal(convolution, tensor, cache, above_and_below):
    """A 3×3×3 convolution that sees two frames of the past, zeros before the first, as a video VAE has it."""
    past = tensor.new_zeros(*tensor.shape[:2], 2, *tensor.shape[3:]) if cache is None else cache
    padded = F.pad(torch.cat([past, tensor], dim=2), (1, 1, above_and_below, above_and_below))
    return F.conv3d(padded, convolution.weight, convolution.bias)


def _frame_attention(query, rows_key, rows_value):
    """Attention of this rank's places over all places of the frame; `[B, C, h, w]`."""
    query, key, value = (tensor.flatten(2).transpose(1, 2) for tensor in (query, rows_key, rows_value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


@torch.no_grad()
def _decoder_error(rank, rows):
    """A causal convolution with a cache, attention over each frame, upsampling, convolution, downsampling."""
    group = world_group()
    causal, fine = _convolution(nn.Conv3d, 3), _convolution(nn.Conv2d, 3, padding=1)
    coarse = _convolution(nn.Conv2d, 3, stride=2)
    whole = _picture(sum(rows), frames=4)
    first, second = whole[:, :, :2], whole[:, :, 2:]

    def tail(frame, up, down):
        finer = up(F.interpolate(frame, scale_factor=2.0, mode="nearest-exact"))
        return down(F.pad(finer, (0, 1)))

    middle = _causal(causal, second, first, 1)[:, :, 0]
    middle = middle + _frame_attention(middle, middle, middle).view_as(middle)
    expected = tail(middle, fine, lambda tensor: coarse(F.pad(tensor, (0, 0, 0, 1))))

    own, own_past = (_own(rank, part, rows) for part in (second, first))
    both = with_halo(torch.cat([own_past, own], dim=2), group, rows, kernel=3, padding=(1, 1))
    out = _causal(causal, both[:, :, 2:], both[:, :, :2], 0)[:, :, 0]
    gathered = torch.cat(group.all_gather(out, rows, dim=2), dim=2)
    out = out + _frame_attention(out, gathered, gathered).view_as(out)
    finer = upsampled_rows(rows)
    out = tail(
        out,
        lambda tensor: convolve(fine, tensor, group, finer),
        lambda tensor: convolve(coarse, tensor, group, finer, padding=(0, 1)),
    )
    return _difference(rank, out, expected, output_rows(finer, 3, 2, (0, 1)))


@pytest.mark.parametrize("rows", [(4,), (2, 3), (1, 1, 1), (3, 1, 2, 1, 4), (2, 2, 1, 1, 1, 1, 1)], ids=str)
def test_chain_of_layers_of_a_video_decoder(ranks, rows):
    assert max(ranks.run(_decoder_error, rows, ranks=len(rows))) < TOLERANCE


# Broken on purpose.


@torch.no_grad()
def _broken_error(rank, broken):
    group = world_group()
    rows = (2, 3, 2)
    convolution = _convolution(nn.Conv2d, 3, padding=1)
    whole = _picture(sum(rows))
    with broken():
        out = convolve(convolution, _own(rank, whole, rows), group, rows)
    return _difference(rank, out, convolution(whole), rows)


def _zeros_for_halo():
    """Every rank pads as if it were alone."""

    def pad(tensor, group, rows, kernel, stride, padding, dim, padding_mode):
        return F.pad(tensor, (0, 0, *padding))

    return mock.patch.object(parallel.halo, "with_halo", pad)


def _halo_of_the_wrong_rows():
    """Rows taken one too far down, with the same shapes."""

    def shifted(tensor, group, rows, wanted, dim, padding_mode):
        wanted = [(start + 1, stop + 1) for start, stop in wanted]
        return fetch_rows(tensor, group, rows, wanted, dim, padding_mode)

    return mock.patch.object(parallel.halo, "fetch_rows", shifted)


@pytest.mark.parametrize("broken", [_zeros_for_halo, _halo_of_the_wrong_rows])
def test_wrong_halo_is_seen(ranks, broken):
    assert min(ranks.run(_broken_error, broken, ranks=3)) > 1e-2


# Bytes and calls.


@torch.no_grad()
def _metered(rank, rows, kernel, stride, padding):
    meter = Meter()
    group = world_group(meter)
    with_halo(_own(rank, _picture(sum(rows)), rows), group, rows, kernel, stride, padding)
    return meter


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "sent_rows"),
    [
        (3, 1, (1, 1), [1, 2, 2, 1]),
        (5, 1, (2, 2), [2, 4, 4, 2]),
        (3, 2, (0, 1), [0, 1, 1, 1]),  # each rank needs the first row of the next
        (1, 1, (0, 0), [0, 0, 0, 0]),
    ],
)
def test_only_the_halo_travels(ranks, kernel, stride, padding, sent_rows):
    meters = ranks.run(_metered, (4, 2, 6, 4), kernel, stride, padding, ranks=4)
    row_bytes = 2 * CHANNELS * WIDTH * 8
    assert [meter.total_bytes for meter in meters] == [rows * row_bytes for rows in sent_rows]
    assert all(meter.total_calls == (kernel > 1) for meter in meters)


# Arithmetic.


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=6),
    st.integers(1, 5),
    st.integers(1, 3),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_output_rows_are_those_of_the_whole(rows, kernel, stride, padding):
    total = sum(rows) + sum(padding)
    assume(total >= kernel)
    whole = F.conv1d(torch.zeros(1, 1, total), torch.zeros(1, 1, kernel), stride=stride).shape[-1]
    begins = offsets(rows)
    owners = [max(rank for rank, begin in enumerate(begins) if begin <= j * stride) for j in range(whole)]
    expected = tuple(owners.count(rank) for rank in range(len(rows)))
    if min(expected) == 0:
        with pytest.raises(ValueError, match="every rank must keep a row; use fewer ranks"):
            output_rows(rows, kernel, stride, padding)
    else:
        assert output_rows(rows, kernel, stride, padding) == expected


def test_what_does_not_fit_is_refused():
    group = world_group()
    with pytest.raises(ValueError, match="dim -2 must follow the rows"):
        fetch_rows(_picture(4), group, (3,), [(0, 3)], -2)
    with pytest.raises(ValueError, match="every rank must want at least one of the 4 rows"):
        fetch_rows(_picture(4), group, (4,), [(4, 6)], -2)
    with pytest.raises(ValueError, match="padding mode 'circular': allowed are 'zeros' and 'replicate'"):
        convolve(_convolution(nn.Conv2d, 3, padding=1, padding_mode="circular"), _picture(4), group, (4,))
