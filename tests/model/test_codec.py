"""Unit and multi-rank gloo: dtype, groups and TF32 of the VAE, whole and split over 2 ranks; GPU: on a card.

Deviations are in grey levels of 255 against fp32 frames of a tiny model whose frames vary by 44 (their standard
deviation). bfloat16 keeps 8 bits, half a level at full scale in one rounding: 0.57 on average here and 7.4 at most.
float16 keeps 3 bits more, so an eighth of that. The limits leave twice as much; `test_precision_of_a_dtype` ties the
two to each other, which no wrong conversion would. fp32 is held to 1e-5 of the range, as in `tests/model/vae`. The rest
is exact.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn

from benchmarks.ranks.pool import shared_pool
from helios_cp.config.execution import Execution
from helios_cp.config.request import Request
from helios_cp.files.mp4 import encode_segment
from helios_cp.generate.__main__ import main
from helios_cp.model import codec as module
from helios_cp.model.codec import (
    Codec,
    convolution_tf32,
    denormalise,
    sample,
    to_frames,
    vae_settings,
)
from helios_cp.model.vae.autoencoder import Autoencoder
from helios_cp.model.vae.config import VaeConfig
from helios_cp.pipeline.parallelize import SplitCodec
from helios_cp.pipeline.pipeline import Pipeline
from tests.parallel.reference import world_group

LIMITS = {"bfloat16": (1.15, 15.0), "float16": (0.15, 1.9)}  # mean and largest deviation, in grey levels
CASES = [
    Execution(vae_dtype=dtype, vae_group=group) for dtype in ("float32", "bfloat16", "float16") for group in (None, 2)
]
CUDNN = torch.backends.cudnn


@cache
def load(folder: Path) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(folder).eval().requires_grad_(False)


def make_codec(folder: Path, execution: Execution, group=None) -> Codec:
    vae = Autoencoder(VaeConfig.from_dict(load(folder).config)).eval().requires_grad_(False)
    vae.load_state_dict(load(folder).state_dict())
    return Codec(vae, execution) if group is None else SplitCodec(vae, group, execution)


def make_latents(frames: int = 3) -> torch.Tensor:
    return torch.randn(1, 16, frames, 8, 8, generator=torch.Generator().manual_seed(0))


def make_video() -> torch.Tensor:
    return torch.rand(1, 3, 5, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def deviation(frames: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Mean and largest, in grey levels."""
    assert frames.shape == exact.shape and frames.dtype == torch.float32
    levels = (frames - exact).abs() * 255
    return levels.mean().item(), levels.max().item()


@pytest.fixture(scope="module")
def folder(presets) -> Path:
    return presets["random-distilled"] / "vae"


@pytest.fixture(scope="module")
def exact(folder) -> torch.Tensor:
    """The frames by diffusers' VAE itself, untouched."""
    vae = load(folder)
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        return to_frames(vae.decode(make_latents() / (1 / std) + mean).sample.movedim(1, -1), "float")


# Dtypes and groups


@torch.no_grad()
def run_split(rank: int, folder: Path) -> list:
    """Each case's frames and posterior, from 2 ranks."""
    found = []
    for execution in CASES:
        codec = make_codec(folder, execution, world_group())
        frames = codec.decode(make_latents(), "float")
        (posterior,) = codec.encode([make_video() if rank == 0 else None])
        found.append(None if rank else (frames, posterior))
    return found


@pytest.fixture(scope="module")
def found(folder) -> dict[tuple[int, Execution], tuple[torch.Tensor, torch.Tensor]]:
    """Frames and posterior by number of ranks and case."""
    split, other = shared_pool().run(run_split, folder, ranks=2)
    assert other == [None] * len(CASES)
    values = {(2, case): result for case, result in zip(CASES, split, strict=True)}
    with torch.no_grad():
        for case in CASES:
            codec = make_codec(folder, case)
            values[1, case] = codec.decode(make_latents(), "float"), codec.encode([make_video()])[0]
    return values


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.vae_dtype}-{case.vae_group}")
def test_frames_and_posteriors(found, exact, ranks, case):
    frames, parameters = found[ranks, case]
    plain = found[1, Execution()][1]
    assert parameters.dtype == torch.float32 and parameters.shape == plain.shape
    if case.vae_dtype == "float32":
        assert (frames - exact).abs().max() <= 1e-5
        assert (parameters - plain).abs().max() <= 1e-5 * (plain.max() - plain.min())
        return
    mean, largest = deviation(frames, exact)
    assert 0 < mean <= LIMITS[case.vae_dtype][0] and largest <= LIMITS[case.vae_dtype][1]
    assert 0 < (parameters - plain).abs().max() <= 0.1 * (plain.max() - plain.min())


def test_precision_of_a_dtype(found, exact):
    """3 bits more are a factor of 8; frames of another chunk would be 40 grey levels away."""
    means = {dtype: deviation(found[1, Execution(vae_dtype=dtype)][0], exact)[0] for dtype in LIMITS}
    assert 6 <= means["bfloat16"] / means["float16"] <= 10
    assert deviation(exact.roll(8, dims=2), exact)[0] > 10 * LIMITS["bfloat16"][0]


def test_noise_of_a_posterior_is_the_same_in_every_dtype(folder):
    """Were it drawn in the VAE's dtype, it would be other numbers, and the video another."""
    codecs = [make_codec(folder, Execution(vae_dtype=dtype)) for dtype in ("float32", "bfloat16")]
    parameters = torch.cat([torch.zeros(1, 16, 1, 8, 8), torch.full((1, 16, 1, 8, 8), 2.0)], 1)
    drawn = [codec.draw(parameters, torch.Generator().manual_seed(3)) for codec in codecs]
    assert torch.equal(*drawn) and drawn[0].dtype == torch.float32
    assert not torch.equal(codecs[1].draw(parameters.bfloat16(), torch.Generator().manual_seed(3)).float(), drawn[0])


def test_latents_are_denormalised_in_fp32(folder):
    codec, config = make_codec(folder, Execution(vae_dtype="bfloat16")), load(folder).config
    mean, std = (torch.tensor(config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    assert torch.equal(denormalise(codec.vae, make_latents()), make_latents() / (1 / std) + mean)


@torch.no_grad()
def test_a_group_is_chosen_once_for_a_size_and_told(folder, monkeypatch):
    codec, free = make_codec(folder, Execution()), iter([10**12, 0])
    monkeypatch.setattr(module, "free_host_memory", lambda: next(free))
    assert codec.last_group is None
    for _ in range(2):
        codec.decode(make_latents(), "uint8")
        assert codec.last_group == 3
    codec.encode([make_video()])
    assert codec.last_group == 1


@torch.no_grad()
def test_a_clip_is_brought_to_the_vae_group_by_group(folder, monkeypatch):
    """Its memory does not grow with the length of the clip: the encoder never sees more than a group's frames."""
    codec, seen = make_codec(folder, Execution(vae_group=2)), []
    codec.vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    codec.encode([torch.rand(1, 3, 33, 64, 64)])
    assert seen == [5, 8, 8, 8, 4]


# TF32


def precisions() -> tuple[str, str, str]:
    return CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision, torch.backends.cuda.matmul.fp32_precision


@pytest.fixture(autouse=True)
def settings():
    """torch's settings as they were."""
    matmul = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.fp32_precision = "none"
    CUDNN.allow_tf32 = True
    assert torch.backends.cuda.matmul.fp32_precision == matmul


@pytest.mark.parametrize("before", ["default", "older name", "newer name", "for all"])
@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_set_for_convolutions_and_put_back(before, allowed):
    if before == "older name":
        CUDNN.allow_tf32 = False
    elif before == "newer name":
        CUDNN.conv.fp32_precision = "ieee"
    elif before == "for all":
        torch.backends.fp32_precision = "tf32"
    found = precisions()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), convolution_tf32(allowed):
            assert (CUDNN.conv.fp32_precision == "tf32") is allowed
            assert precisions()[2] == found[2]
            if before != "for all":
                assert CUDNN.allow_tf32 is allowed  # which torch's compiler reads
            with convolution_tf32(not allowed):
                assert (CUDNN.conv.fp32_precision == "tf32") is not allowed
            assert (CUDNN.conv.fp32_precision == "tf32") is allowed
            raise ZeroDivisionError
        assert precisions() == found


def seen_precision(codec: Codec, call) -> set[bool]:
    """Whether TF32 is allowed where convolutions run."""
    seen = set()
    with ExitStack() as stack:
        for layer in codec.vae.modules():
            if isinstance(layer, nn.Conv3d):
                hook = layer.register_forward_pre_hook(lambda *_: seen.add(CUDNN.conv.fp32_precision == "tf32"))
                stack.callback(hook.remove)
        call()
    return seen


@torch.no_grad()
def run_precision(rank: int, folder: Path, ranks: int) -> list[set[bool]]:
    """For TF32 on and off: what is allowed in decode and encode, when torch is set the other way around."""
    found = []
    for tf32 in (True, False):
        codec = make_codec(folder, Execution(tf32=tf32), world_group() if ranks > 1 else None)
        CUDNN.allow_tf32 = not tf32
        found.append(seen_precision(codec, lambda codec=codec: codec.decode(make_latents(1), "uint8")))
        video = make_video()[:, :, :1] if rank == 0 else None
        found.append(seen_precision(codec, lambda codec=codec, video=video: codec.encode([video])))
        assert CUDNN.allow_tf32 is not tf32
    CUDNN.allow_tf32 = True
    return found


def test_the_vae_runs_as_stated(folder):
    expected = [{True}, {True}, {False}, {False}]
    assert run_precision(0, folder, 1) == expected
    assert shared_pool().run(run_precision, folder, 2, ranks=2) == [expected] * 2


def test_a_codec_that_states_nothing_leaves_it_to_torch(folder):
    """So the test above can fail."""
    codec = make_codec(folder, Execution())
    codec.tf32 = None
    for value in (True, False):
        CUDNN.allow_tf32 = value
        assert seen_precision(codec, lambda: codec.decode(make_latents(1), "uint8")) == {value}


# What a user sees


def test_settings_that_are_reported(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(module, "has_tf32", lambda device: device.type == "cuda")
    assert vae_settings(Execution(), cuda)["convolutions"] == "tf32"
    assert vae_settings(Execution(tf32=False), cuda)["convolutions"] == "float32"
    assert vae_settings(Execution(), cpu)["convolutions"] == "float32"
    low = vae_settings(Execution(vae_dtype="bfloat16"), cuda)
    assert low == {"dtype": "bfloat16", "convolutions": "bfloat16"}


def test_flags_reach_the_frames_and_the_report(presets, cache, tmp_path, monkeypatch):
    """Latents are those of fp32, to the bit; frames are not."""
    monkeypatch.setenv("HELIOS_CP_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    fields = {"height": 64, "width": 64, "num_frames": 33, "pyramid_num_inference_steps_list": (1, 1, 1)}
    flags = ["--height", "64", "--width", "64", "--num-frames", "33", "--pyramid-steps", "1", "1", "1"]
    flags += ["--dtype", "float32", "--device", "cpu", "--prompt", "a fox", "--report", "r.json", "--no-tf32"]
    frames = []
    monkeypatch.setattr(
        "helios_cp.generate.run.encode_segment",
        lambda video, fps: (frames.append(video), encode_segment(video, fps))[1],
    )
    assert main([*flags, "--model", "random-distilled", "--vae-dtype", "bfloat16", "--vae-group", "4"]) == 0
    report = json.loads(Path("r.json").read_text())
    assert report["vae"] == {"dtype": "bfloat16", "convolutions": "bfloat16", "latent_frames_together": 4}
    assert report["execution"]["tf32"] is False
    pipeline = Pipeline.from_pretrained(str(presets["random-distilled"]), dtype=torch.float32)
    (chunk,) = pipeline.stream(Request(prompt=("a fox",), **fields), output_type="float")
    mean, largest = deviation(frames[0].float() / 255, chunk.frames[0])
    assert 0.3 < mean <= LIMITS["bfloat16"][0] + 0.5 and largest <= LIMITS["bfloat16"][1] + 0.5  # of rounding to bytes


# On a card


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_card(folder, exact):
    """TF32 keeps 10 bits as float16 does, in the products alone; without it fp32 on a card is that of a CPU."""
    results = {}
    for name, execution in {
        "tf32": Execution(),
        "float32": Execution(tf32=False),
        **{dtype: Execution(vae_dtype=dtype) for dtype in LIMITS},
        "groups": Execution(tf32=False, vae_group=2),
    }.items():
        codec = make_codec(folder, execution)
        codec.vae.to("cuda")
        results[name] = deviation(codec.decode(make_latents(), "float").cpu(), exact)
    assert max(results["float32"][1], results["groups"][1]) <= 255e-4
    assert results["float32"][0] < results["tf32"][0] <= LIMITS["float16"][0]
    for dtype, (mean, largest) in LIMITS.items():
        assert results[dtype][0] <= mean and results[dtype][1] <= largest


def test_samples_are_those_of_diffusers():
    """Bit for bit, with log-variances outside of the range that they are kept in."""
    parameters = torch.randn(2, 32, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 40
    ours = sample(parameters, torch.Generator().manual_seed(1))
    theirs = DiagonalGaussianDistribution(parameters).sample(torch.Generator().manual_seed(1))
    assert torch.equal(ours, theirs)
