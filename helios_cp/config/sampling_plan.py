"""How the chunks of a request are denoised. This is arithmetic; nothing is loaded for it."""

from __future__ import annotations

from dataclasses import dataclass

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.request import Request


@dataclass(frozen=True)
class SamplingPlan:
    """How every chunk of a request is denoised."""

    steps: tuple[int, ...]
    is_pyramid: bool
    is_distilled: bool
    guidance_scale: float
    is_cfg_zero_star: bool
    zero_steps: int
    amplify_first_chunk: bool
    sigmas: tuple[float, ...] | None
    patch_size: tuple[int, int, int]

    @classmethod
    def of(cls, request: Request, checkpoint: Checkpoint) -> SamplingPlan:
        """The plan of a resolved request."""
        steps = request.pyramid_num_inference_steps_list if checkpoint.is_pyramid else (request.num_inference_steps,)
        return cls(
            steps=steps,
            is_pyramid=checkpoint.is_pyramid,
            is_distilled=checkpoint.is_distilled,
            guidance_scale=1.0 if checkpoint.is_distilled else request.guidance_scale,
            is_cfg_zero_star=checkpoint.is_cfg_zero_star,
            zero_steps=request.zero_steps if request.use_zero_init else -1,
            amplify_first_chunk=bool(request.is_amplify_first_chunk),
            sigmas=request.sigmas,
            patch_size=checkpoint.transformer.patch_size,
        )

    @property
    def is_guided(self) -> bool:
        """Whether a step needs the negative prompt too. Distilled checkpoints have their guidance built in."""
        return self.guidance_scale > 1.0

    def is_zeroed(self, stage: int, step: int) -> bool:
        """CFG-Zero* starts from a zero velocity (arXiv:2503.18886): such a step needs no forward at all.

        The comparison includes `zero_steps` itself, so 1 zeroes two steps.
        """
        return self.is_guided and self.is_cfg_zero_star and stage == 0 and step <= self.zero_steps

    def total_steps(self, chunk: int) -> int:
        doubled = self.amplify_first_chunk and chunk == 0
        return sum(self.steps) * (2 if doubled else 1)
