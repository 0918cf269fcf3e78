"""Pictures and clips that Python users pass: paths, PIL images, arrays and tensors, all as tensors in [-1, 1].

Types and ranges are those of diffusers' `VideoProcessor`.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from PIL import Image

from helios_cp.config.checkpoint import VAE_SPATIAL
from helios_cp.config.errors import RequestError
from helios_cp.files.clips import Ends, read_ends, read_video
from helios_cp.files.pictures import PathLike, read_image, resize, to_rgb

Picture = PathLike | Image.Image | np.ndarray | torch.Tensor
Clip = PathLike | list[Image.Image] | list[np.ndarray] | list[torch.Tensor] | np.ndarray | torch.Tensor


def to_image_tensor(picture: Picture, height: int, width: int, mode: str = "stretch") -> torch.Tensor:
    """Turn what Python users pass into fp32 `[1, 3, height, width]` in [-1, 1].

    picture: a path, a PIL image, a numpy array `[H, W, 3]` or `[1, H, W, 3]`, or a torch tensor `[3, H, W]` or
    `[1, 3, H, W]`. uint8 arrays and tensors are pictures in 0 to 255, resized like PIL images. Floating-point ones
    follow `VideoProcessor`: their range is [0, 1], or [-1, 1] if any value is negative, and resizing takes the nearest
    pixel. Raises `RequestError`.
    """
    if isinstance(picture, (str, os.PathLike)):
        return read_image(picture, height, width, mode)
    if isinstance(picture, Image.Image):
        return resize(to_rgb(picture), height, width, mode)
    if isinstance(picture, (np.ndarray, torch.Tensor)):
        return _resize_frames("image", _to_frames("image", picture, dims=3), height, width, mode)[:, :, 0]
    raise RequestError(
        f"image of type {type(picture).__name__}: allowed are a path, a PIL image, an array and a tensor"
    )


def to_video_tensor(clip: Clip, height: int, width: int, mode: str = "stretch") -> torch.Tensor:
    """Turn what Python users pass into fp32 `[1, 3, T, height, width]` in [-1, 1].

    clip: a path, a list of PIL images, a numpy array `[T, H, W, 3]` or `[1, T, H, W, 3]`, a torch tensor `[T, 3, H, W]`
    or `[1, T, 3, H, W]`, or a list of frames as arrays or tensors. Types and ranges are those of `to_image_tensor`.
    Raises `RequestError`.
    """
    if isinstance(clip, (str, os.PathLike)):
        return read_video(clip, height, width, mode)
    if isinstance(clip, (list, tuple)) and clip:
        if all(isinstance(frame, Image.Image) for frame in clip):
            return torch.stack([resize(to_rgb(frame), height, width, mode) for frame in clip], dim=2)
        # Stacked before anything else, so that one decision on the range of values holds for all frames.
        if all(isinstance(frame, np.ndarray) for frame in clip) and len({frame.shape for frame in clip}) == 1:
            clip = np.stack(clip)
        elif all(isinstance(frame, torch.Tensor) for frame in clip) and len({frame.shape for frame in clip}) == 1:
            clip = torch.stack(list(clip))
    if isinstance(clip, (np.ndarray, torch.Tensor)):
        return _resize_frames("video", _to_frames("video", clip, dims=4), height, width, mode)
    raise RequestError(
        f"video of type {type(clip).__name__}: allowed are a path, an array, a tensor, and a list of PIL images or of "
        "frames of one size"
    )


def clip_ends(clip: Clip, height: int, width: int, most: int, mode: str = "stretch") -> Ends:
    """The first frame and at most the last `most`, as `to_video_tensor` reads them. Raises `RequestError`.

    Of a file no more than these are held at a time, whatever its length.
    """
    if isinstance(clip, (str, os.PathLike)):
        return read_ends(clip, height, width, most, mode)
    video = to_video_tensor(clip, height, width, mode)
    return Ends(video.shape[2], video[:, :, :1], video[:, :, -most:])


def _to_frames(name: str, value: np.ndarray | torch.Tensor, dims: int) -> torch.Tensor:
    """An array `[..., H, W, 3]` or tensor `[..., 3, H, W]` of `dims` dims, or one more of size 1, as `[T, 3, H, W]`."""
    is_array = isinstance(value, np.ndarray)
    tensor = torch.tensor(value) if is_array else value.detach().cpu()
    if tensor.ndim == dims + 1 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim == dims and is_array:
        tensor = tensor.movedim(-1, -3)
    if tensor.ndim != dims or tensor.shape[-3] != 3 or not tensor.numel():
        frames = "T, " if dims == 4 else ""
        allowed = f"[{frames}H, W, 3]" if is_array else f"[{frames}3, H, W]"
        raise RequestError(f"{name} of shape {list(value.shape)}: allowed is {allowed}, with or without a leading 1")
    return tensor.reshape(-1, *tensor.shape[-3:])


def _resize_frames(name: str, frames: torch.Tensor, height: int, width: int, mode: str) -> torch.Tensor:
    """`[T, 3, H, W]` → `[1, 3, T, height, width]`, by the rules that `to_image_tensor` states."""
    if frames.dtype == torch.uint8:
        pictures = (Image.fromarray(frame.movedim(0, -1).contiguous().numpy()) for frame in frames)
        return torch.stack([resize(picture, height, width, mode) for picture in pictures], dim=2)
    frames = frames.float()
    low, high = frames.min().item(), frames.max().item()
    if not (low >= -1 and high <= 1):
        raise RequestError(f"{name} with values from {low:g} to {high:g}: allowed are uint8, [0, 1] and [-1, 1]")
    if mode != "stretch":
        raise RequestError(f"{name} of floating-point values: --resize-mode {mode} takes uint8; stretch takes both")
    from diffusers.video_processor import VideoProcessor  # as in `resize`

    processor = VideoProcessor(vae_scale_factor=VAE_SPATIAL, do_normalize=low >= 0)
    return processor.preprocess_video(frames, height=height, width=width)
