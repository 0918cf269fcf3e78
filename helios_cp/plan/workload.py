"""The work of one chunk, whatever it runs on: tokens and forwards of each stage, and what is decoded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from helios_cp.config.checkpoint import Checkpoint, TransformerConfig
from helios_cp.config.layout import segment_lengths
from helios_cp.config.request import Request
from helios_cp.config.sampling_plan import SamplingPlan
from helios_cp.model.vae.config import VaeConfig
from helios_cp.plan import vae_cost
from helios_cp.plan.configs import TextEncoderConfig, part_configs
from helios_cp.plan.forward_cost import ForwardCost, forward_cost
from helios_cp.plan.rank_shares import Share, whole
from parallel.degrees import Degrees

ALONE = Degrees()


@dataclass(frozen=True)
class PyramidStage:
    """Tokens of a pyramid stage (long · mid · short · noisy), and how many forwards a branch of guidance has there."""

    lengths: tuple[int, ...]
    forwards: int

    @property
    def noisy(self) -> int:
        return self.lengths[-1]


@dataclass(frozen=True)
class Workload:
    """The work of a chunk other than the first, of `batch` videos at once."""

    config: TransformerConfig
    vae: VaeConfig
    text_encoder: TextEncoderConfig
    stages: tuple[PyramidStage, ...]
    is_guided: bool
    dtype: torch.dtype
    text_tokens: int
    latent_frames: int
    latent_size: tuple[int, int]
    frames: int
    batch: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, request: Request, dtype: torch.dtype) -> Workload:
        """Of a resolved request; steps that CFG-Zero* zeroes need no forward.

        Raises `RequestError` where the configs of the checkpoint's parts cannot be read.
        """
        plan = SamplingPlan.of(request, checkpoint)
        vae, text_encoder = part_configs(checkpoint)
        lengths = segment_lengths(request, checkpoint)
        forwards = [
            sum(not plan.is_zeroed(stage, step) for step in range(steps)) for stage, steps in enumerate(plan.steps)
        ]
        return cls(
            config=checkpoint.transformer,
            vae=vae,
            text_encoder=text_encoder,
            stages=tuple(PyramidStage(tuple(each), count) for each, count in zip(lengths, forwards, strict=True)),
            is_guided=plan.is_guided,
            dtype=dtype,
            text_tokens=request.max_sequence_length,
            latent_frames=request.num_latent_frames_per_chunk,
            latent_size=request.latent_size,
            frames=request.frames_per_chunk,
            batch=request.batch_size,
        )

    def forward_cost(self, stage: PyramidStage, own: Share | None = None, degrees: Degrees = ALONE) -> ForwardCost:
        """What one forward of one sample costs a rank with a share of the tokens, or one that is alone."""
        own = own or whole(self.config, stage.lengths)
        return forward_cost(self.config, own, degrees, self.text_tokens, self.dtype.itemsize)

    @property
    def branches(self) -> int:
        return 2 if self.is_guided else 1

    @property
    def forwards(self) -> int:
        """Of a chunk, all branches together."""
        return sum(stage.forwards for stage in self.stages) * self.branches

    @property
    def flops(self) -> int:
        """Of a chunk, on one rank."""
        forwards = sum(stage.forwards * self.forward_cost(stage).flops for stage in self.stages)
        return self.batch * (self.branches * forwards + self.decode_flops)

    @property
    def decode_flops(self) -> int:
        """Of one video."""
        return vae_cost.decode_flops(self.vae, self.latent_frames, *self.latent_size)
