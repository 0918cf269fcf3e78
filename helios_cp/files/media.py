"""Pictures and clips that users give: checked before any model is loaded, and read as tensors in [-1, 1].

Resizing (Lanczos, to the exact size, without cropping) and normalising are those of diffusers' `VideoProcessor`, so the
numbers are those that a diffusers pipeline would see.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

import av
import numpy as np
import torch
from av.stream import Disposition
from diffusers.video_processor import VideoProcessor
from PIL import Image, ImageOps

from helios_cp.config.checkpoint import VAE_SPATIAL
from helios_cp.config.errors import RequestError
from helios_cp.files.mp4 import EXACT_CONVERSION

PathLike = str | os.PathLike[str]
Picture = PathLike | Image.Image | np.ndarray | torch.Tensor
Clip = PathLike | list[Image.Image] | list[np.ndarray] | list[torch.Tensor] | np.ndarray | torch.Tensor

# How FFmpeg's counterclockwise degrees of a clip filmed with a turned camera map to Pillow's turns.
_TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
    -90: Image.Transpose.ROTATE_270,
}


def check_image(path: PathLike) -> None:
    """Raise `RequestError` unless the file holds a whole picture."""
    _load_picture(path)


def check_video(path: PathLike, minimum_frames: int) -> None:
    """Raise `RequestError` unless every frame decodes and there are at least `minimum_frames` of them.

    One frame is held at a time, whatever the length of the clip. Damage is found as far as the format tells: VP9 has no
    means to notice it, and a Matroska file that is cut off is just a shorter one.
    """
    count = sum(1 for _ in _decode_frames(path))
    if count < minimum_frames:
        raise RequestError(
            f"--video {path}: the clip has {count} frame(s), {minimum_frames} are needed; give a longer one"
        )


def read_image(path: PathLike, height: int, width: int) -> torch.Tensor:
    """Read a picture as fp32 `[1, 3, height, width]` in [-1, 1].

    EXIF orientation is honoured; grey, palette, CMYK and 16-bit pictures become RGB, and transparent ones are laid over
    white. Of an animation the first picture counts. Raises `RequestError`.
    """
    return _resize(_load_picture(path), height, width)


def read_video(path: PathLike, height: int, width: int) -> torch.Tensor:
    """Read a clip as fp32 `[1, 3, T, height, width]` in [-1, 1], T being the number of frames in the file.

    Frames are resized as they are decoded, so memory holds resized frames only. The colour matrix and range of the file
    and the orientation of the camera are honoured; the frame rate is not looked at. Raises `RequestError`.
    """
    frames = [_resize(_frame_to_picture(frame), height, width) for frame in _decode_frames(path)]
    return torch.stack(frames, dim=2)


def to_image_tensor(picture: Picture, height: int, width: int) -> torch.Tensor:
    """Turn what Python users pass into fp32 `[1, 3, height, width]` in [-1, 1].

    picture: a path, a PIL image, a numpy array `[H, W, 3]` or `[1, H, W, 3]`, or a torch tensor `[3, H, W]` or
    `[1, 3, H, W]`. uint8 arrays and tensors are pictures in 0 to 255, resized like PIL images. Floating-point ones
    follow `VideoProcessor`: their range is [0, 1], or [-1, 1] if any value is negative, and resizing takes the nearest
    pixel. Raises `RequestError`.
    """
    if isinstance(picture, (str, os.PathLike)):
        return read_image(picture, height, width)
    if isinstance(picture, Image.Image):
        return _resize(_to_rgb(picture), height, width)
    if isinstance(picture, (np.ndarray, torch.Tensor)):
        return _resize_frames("image", _to_frames("image", picture, dims=3), height, width)[:, :, 0]
    raise RequestError(
        f"image of type {type(picture).__name__}: allowed are a path, a PIL image, an array and a tensor"
    )


def to_video_tensor(clip: Clip, height: int, width: int) -> torch.Tensor:
    """Turn what Python users pass into fp32 `[1, 3, T, height, width]` in [-1, 1].

    clip: a path, a list of PIL images, a numpy array `[T, H, W, 3]` or `[1, T, H, W, 3]`, a torch tensor `[T, 3, H, W]`
    or `[1, T, 3, H, W]`, or a list of frames as arrays or tensors. Types and ranges are those of `to_image_tensor`.
    Raises `RequestError`.
    """
    if isinstance(clip, (str, os.PathLike)):
        return read_video(clip, height, width)
    if isinstance(clip, (list, tuple)) and clip:
        if all(isinstance(frame, Image.Image) for frame in clip):
            return torch.stack([_resize(_to_rgb(frame), height, width) for frame in clip], dim=2)
        # Stacked before anything else, so that one decision on the range of values holds for all frames.
        if all(isinstance(frame, np.ndarray) for frame in clip) and len({frame.shape for frame in clip}) == 1:
            clip = np.stack(clip)
        elif all(isinstance(frame, torch.Tensor) for frame in clip) and len({frame.shape for frame in clip}) == 1:
            clip = torch.stack(list(clip))
    if isinstance(clip, (np.ndarray, torch.Tensor)):
        return _resize_frames("video", _to_frames("video", clip, dims=4), height, width)
    raise RequestError(
        f"video of type {type(clip).__name__}: allowed are a path, an array, a tensor, and a list of PIL images or of "
        "frames of one size"
    )


def _load_picture(path: PathLike) -> Image.Image:
    _check_file("--image", path)
    try:
        with Image.open(path) as picture:
            return _to_rgb(picture)
    except Exception as error:  # what Pillow raises for broken files differs from format to format
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(f"--image {path}: this cannot be read as a picture ({reason}); give a PNG or JPEG") from None


def _to_rgb(picture: Image.Image) -> Image.Image:
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        picture = _to_8_bits(picture)
    elif picture.mode == "F":
        raise RequestError("image with floating-point pixels: their range is unknown; save it with 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _to_8_bits(picture: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion clips it to white."""
    pixels = np.asarray(picture).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise RequestError("image with 32-bit pixels: save it with 8 or 16 bits")
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8))


def _resize(picture: Image.Image, height: int, width: int) -> torch.Tensor:
    return VideoProcessor(vae_scale_factor=VAE_SPATIAL).preprocess(picture, height=height, width=width)


def _decode_frames(path: PathLike) -> Iterator[av.VideoFrame]:
    """Yield every frame of a clip; a corrupt or missing part raises `RequestError`."""
    _check_file("--video", path)
    try:
        # An absolute path, for FFmpeg takes a name such as "a:b.mp4" for a protocol.
        with av.open(os.path.abspath(path), metadata_errors="ignore") as container:
            stream = _video_stream(path, container)
            # Only with one thread does FFmpeg's H.264 decoder say which frames it had to patch up.
            stream.thread_type = "NONE"
            count = 0
            for packet in container.demux(stream):
                for frame in packet.decode():
                    if packet.is_corrupt or frame.is_corrupt:
                        raise RequestError(f"--video {path}: frame {count} is corrupt; give an undamaged clip")
                    yield frame
                    count += 1
    except (av.FFmpegError, OSError) as error:
        raise RequestError(f"--video {path}: this cannot be read as a video ({error.strerror}); give an MP4") from None
    if not count:
        raise RequestError(f"--video {path}: no frame could be decoded; give an MP4")


def _video_stream(path: PathLike, container: av.container.InputContainer) -> av.VideoStream:
    # A sound file's cover is no clip, and neither is text, which FFmpeg would render as a terminal.
    streams = [s for s in container.streams.video if s.codec_context and not s.disposition & Disposition.attached_pic]
    if not streams or container.format.name == "tty":
        raise RequestError(f"--video {path}: there is no video stream to decode in it; give an MP4")
    end = max((entry.pos + entry.size for entry in streams[0].index_entries), default=0)
    if end > os.path.getsize(path):
        raise RequestError(f"--video {path}: the file is cut off, its frames reach to byte {end}; give the whole file")
    return streams[0]


def _frame_to_picture(frame: av.VideoFrame) -> Image.Image:
    picture = frame.to_image(interpolation=EXACT_CONVERSION)
    return picture.transpose(_TURNS[frame.rotation]) if frame.rotation in _TURNS else picture


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


def _resize_frames(name: str, frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`[T, 3, H, W]` → `[1, 3, T, height, width]`, by the rules that `to_image_tensor` states."""
    if frames.dtype == torch.uint8:
        pictures = (Image.fromarray(frame.movedim(0, -1).contiguous().numpy()) for frame in frames)
        return torch.stack([_resize(picture, height, width) for picture in pictures], dim=2)
    frames = frames.float()
    low, high = frames.min().item(), frames.max().item()
    if not (low >= -1 and high <= 1):
        raise RequestError(f"{name} with values from {low:g} to {high:g}: allowed are uint8, [0, 1] and [-1, 1]")
    processor = VideoProcessor(vae_scale_factor=VAE_SPATIAL, do_normalize=low >= 0)
    return processor.preprocess_video(frames, height=height, width=width)


def _check_file(flag: str, path: PathLike) -> None:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(f"{flag} {path}: {reason}; give the path of a local file") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise RequestError(f"{flag} {path}: this is {kind}; give the path of a file")
    if not status.st_size:
        raise RequestError(f"{flag} {path}: the file is empty")
