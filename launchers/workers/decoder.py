"""The worker that decodes, which a denoiser can be too."""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from helios_cp.config.request import Request
from helios_cp.device.device import has_streams
from helios_cp.device.streams import to_host, wait_for
from helios_cp.files.mp4 import encode_segment
from helios_cp.model.seams import SeamMatcher
from helios_cp.pipeline.start import Inputs, initial_state, pixels_to_encode
from launchers.messages.arrays import Array, StateArrays
from launchers.messages.messages import ActorInfo, Clock, Decoded, NextStart
from launchers.workers.loading import Loading
from launchers.workers.watched import Watched, own_info


class VaeDecoder(Watched):
    """Latents to frames and MP4 segments, on a stream of its own where the device has one.

    It keeps nothing from one chunk to the next.
    """

    def __init__(self, loading: Loading) -> None:
        self.loading = loading

    def load(self) -> ActorInfo:
        self.load_vae()
        return own_info()

    def load_vae(self) -> None:
        from helios_cp.model.codec import Codec
        from helios_cp.pipeline.environment import prepare
        from helios_cp.runtime.compilation import compile_vae
        from helios_cp.weights.load import load_vae, resolve

        loading = self.loading
        prepare(loading.execution, 1, os.environ)
        self.device = loading.torch_device()
        checkpoint = resolve(loading.model, loading.cache, weights=("vae",))
        self.channels = checkpoint.transformer.in_channels
        self.codec = Codec(load_vae(checkpoint, self.device), loading.execution)
        if loading.execution.compile:
            compile_vae(self.codec.vae)
        self.stream = torch.Stream(self.device) if has_streams(self.device) else contextlib.nullcontext()

    @torch.no_grad()
    def decode(
        self, latents: Array, fps: float, before: NextStart | None, segments: bool, frames: bool
    ) -> tuple[Decoded, np.ndarray | None]:
        """MP4 segments and frames `[B, T, H, W, 3]` uint8 of a chunk's latents; each only if asked for.

        `before` is what the chunk started from, if its first frames are to be matched to the chunk before.
        """
        clock, chunk = Clock(), latents.tensor()
        others = None if before is None else before.state.state(self.device).chunk_before(chunk.shape[2])
        decode = SeamMatcher(partial(self.codec.decode, output_type="uint8"), others)
        with self.stream:
            pixels = to_host(decode(chunk))
            wait_for(self.device)
        clock.part("decode")
        encoded = ()
        if segments:
            encoded = tuple(np.frombuffer(encode_segment(video, fps), np.uint8) for video in pixels)
            clock.part("encode")
        return Decoded(encoded, clock.span()), pixels.numpy() if frames else None

    @torch.no_grad()
    def start(self, request: Request, media: bytes) -> NextStart:
        """The state before chunk 0 of a request whose picture or clip is the file content `media`."""
        clock = Clock()
        name = "image" if request.image is not None else "video"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, Path(getattr(request, name)).name)
            path.write_bytes(media)
            request, inputs = Inputs().merged(replace(request, **{name: str(path)}))
            videos, hidden = pixels_to_encode(request, inputs)
        posteriors = self.codec.encode(videos)
        state = initial_state(request, inputs, self.codec, posteriors, hidden, self.channels, self.device)
        clock.part("media")
        return NextStart(StateArrays.of(state), clock.span())
