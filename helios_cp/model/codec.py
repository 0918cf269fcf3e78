"""Pixels to latents and back, chunk by chunk, with diffusers' `AutoencoderKLWan`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from helios_cp.config.execution import Execution
from helios_cp.device.device import has_tf32
from helios_cp.device.streams import to_device

OUTPUT_TYPES = ("uint8", "float", "latent")


class Codec:
    """A VAE on this rank. `helios_cp.pipeline.parallelize` has one that is split over ranks.

    `tf32` says whether convolutions in fp32 may run on TF32 tensor cores; `None` leaves torch's setting alone.
    """

    def __init__(self, vae, tf32: bool | None = None) -> None:
        self.vae = vae
        self.tf32 = tf32

    @property
    def is_local(self) -> bool:
        """Whether this rank decodes, and without other ranks: only then may it do so beside other work.

        Ranks that share a VAE exchange rows. NCCL does not promise progress to two communicators that are busy at once
        on a card, such as this and that of the denoising, unless all ranks run their operations in one order.
        """
        return self.vae is not None

    def encode(self, videos: Sequence[Tensor]) -> list[DiagonalGaussianDistribution]:
        """The posterior of each video `[1, 3, T, H, W]` in [−1, 1], in fp32; `draw` samples from it."""
        with self.convolutions():
            parameters = [self.vae.encode(as_input(self.vae, video)).latent_dist.parameters for video in videos]
        return [posterior_of(each) for each in parameters]

    def draw(self, posterior: DiagonalGaussianDistribution, generator: torch.Generator) -> Tensor:
        """Normalised latents `[1, C, T/4, H/8, W/8]` in fp32, drawn from a posterior."""
        mean, inverse_std = latent_statistics(self.vae)
        return (posterior.sample(generator=generator) - mean) * inverse_std

    def decode(self, latents: Tensor, output_type: str) -> Tensor | None:
        """Frames `[B, 4(T−1)+1, 8h, 8w, 3]` of one chunk's normalised latents `[B, C, T, h, w]`.

        A chunk decodes alone: nothing of its neighbours is needed. uint8, or fp32 in [0, 1] for output type "float".
        `None` on ranks that the frames do not end on.
        """
        with self.convolutions():
            return to_frames(self.vae.decode(denormalise(self.vae, latents), return_dict=False)[0], output_type)

    def convolutions(self) -> AbstractContextManager[None]:
        """Convolutions inside run in the precision that this codec states."""
        return contextlib.nullcontext() if self.tf32 is None else convolution_tf32(self.tf32)


def vae_settings(execution: Execution, device: torch.device) -> dict[str, Any]:
    """How the VAE runs on a device by an execution, for a report."""
    is_tf32 = execution.tf32 and execution.vae_dtype == "float32" and has_tf32(device)
    return {
        "dtype": execution.vae_dtype,
        "memory_format": "channels_last" if execution.vae_channels_last else "contiguous",
        "convolutions": "tf32" if is_tf32 else execution.vae_dtype,
    }


def to_channels_last(vae: nn.Module) -> None:
    """Lay the weights of the convolutions out channel by channel, as cuDNN's tensor-core kernels read them.

    Inputs follow in `as_input`; convolutions hand the format on, and padding, norms, activations and the frames that
    are kept for the next ones keep it. A resampling's change from videos to images is then a view, where it is a copy
    otherwise. Kernels may add in another order, which is what results differ by.
    """
    for layer in vae.modules():
        if isinstance(layer, nn.Conv3d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)


def is_channels_last(vae: nn.Module) -> bool:
    """Whether `to_channels_last` was called. A weight of one channel or of 1×1×1 is laid out in both ways at once."""
    weights = [layer.weight for layer in vae.modules() if isinstance(layer, nn.Conv3d)]
    return any(not weight.is_contiguous() for weight in weights)


@contextmanager
def convolution_tf32(allowed: bool) -> Iterator[None]:
    """Inside, cuDNN's convolutions in fp32 may use TF32, or must not; matrix products are left alone.

    torch has the older name `allow_tf32` and the newer `conv.fp32_precision` for it. The older one sets both, whereas
    after the newer one alone the older cannot be read, which torch's own compiler does.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    try:
        older = cudnn.allow_tf32
    except RuntimeError:  # somebody has set the newer names apart
        older = None
    cudnn.allow_tf32 = allowed
    if not allowed and cudnn.conv.fp32_precision == "tf32":  # as torch.backends.fp32_precision says for all
        cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        if older is not None:
            cudnn.allow_tf32 = older
        if (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) != before:
            cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before


def latent_statistics(vae) -> tuple[Tensor, Tensor]:
    """Mean and *inverse* standard deviation of the latents, `[1, C, 1, 1, 1]` in fp32."""
    values = torch.tensor([vae.config.latents_mean, vae.config.latents_std], dtype=torch.float32)
    mean, std = to_device(values, vae.device).view(2, 1, vae.config.z_dim, 1, 1, 1)
    return mean, 1.0 / std


def posterior_of(parameters: Tensor) -> DiagonalGaussianDistribution:
    """Of the encoder's output, in fp32: the noise drawn from it is then the same for every dtype of the VAE."""
    return DiagonalGaussianDistribution(parameters.float())


def as_input(vae, tensor: Tensor) -> Tensor:
    """On the device and in the dtype and memory format of a VAE."""
    memory_format = torch.channels_last_3d if is_channels_last(vae) else torch.preserve_format
    return tensor.to(vae.device, vae.dtype, memory_format=memory_format)


def denormalise(vae, latents: Tensor) -> Tensor:
    """Latents as the decoder takes them."""
    mean, inverse_std = latent_statistics(vae)
    return as_input(vae, latents.to(vae.device, torch.float32) / inverse_std + mean)


def to_frames(video: Tensor, output_type: str) -> Tensor:
    """`[B, 3, T, H, W]` in [−1, 1] to `[B, T, H, W, 3]`, contiguous, on the video's device.

    fp32 in [0, 1] for output type "float", else uint8, rounded.
    """
    frames = (video.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)
    return (frames if output_type == "float" else (frames * 255).round().to(torch.uint8)).contiguous()
